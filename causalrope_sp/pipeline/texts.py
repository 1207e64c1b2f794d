"""The texts of a call, encoded on every rank."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor

from causalrope_sp.pipeline.generation_options import Embeds
from causalrope_sp.sampling.agreement import digest
from causalrope_sp.text import load_embeds
from causalrope_sp.text.shared_encoder import share_embeds

if TYPE_CHECKING:
    from causalrope_sp.pipeline.pipeline import CausalVideoPipeline


def encode_all(
    pipe: CausalVideoPipeline, seed: int, pictured: bool, wanted: Sequence[tuple[Any, Embeds | None]]
) -> list[Tensor]:
    """Encodes texts, or takes over embeddings of rank 0. All ranks that denoise must call it.

    Args:
        pipe: the pipeline.
        seed: that of the video, from which a text encoder may draw what a prompt leaves open.
        pictured: whether an image is the first frame of the video.
        wanted: for each a text, or embeddings in its place.

    Returns:
        The embeddings of each, (1, L, E).
    """
    texts = iter(pipe.text.encode_all([text for text, embeds in wanted if embeds is None], seed, pictured))
    share = partial(share_embeds, parallel=pipe.parallel, config=pipe.model.config, dtype=pipe.model.dtype)
    return [next(texts) if embeds is None else share(partial(_loaded, embeds)) for _, embeds in wanted]


def described_embeds(embeds: Embeds | None) -> str:
    """Returns a text that differs for different embeddings; a file, which is read on rank 0 alone, is a file."""
    if embeds is None:
        return "none"
    return digest(embeds) if isinstance(embeds, Tensor) else "a file"


def _loaded(embeds: Embeds) -> Tensor:
    """The embeddings themselves, or those in a file."""
    return embeds if isinstance(embeds, Tensor) else load_embeds(embeds).embeds
