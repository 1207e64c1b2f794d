"""UMT5 as a pipeline asks for it: run on rank 0 alone, and sent to the others, which need none of its files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from causalrope_sp.config import DiTConfig, Keep
from causalrope_sp.distributed import SequenceParallel
from causalrope_sp.errors import ConfigError
from causalrope_sp.text.source import TextSource
from causalrope_sp.text.umt5 import UMT5TextEncoder


class SharedUMT5:
    """The embeddings of a prompt on every rank. The encoder is opened for the first prompt, so that a machine without
    its files can run from given embeddings; one whose files are there and wrong says so when it is made.

    `encoder` is None until it was opened, and for good on every rank but the first."""

    def __init__(
        self, source: TextSource, parallel: SequenceParallel, config: DiTConfig, dtype: torch.dtype, keep: Keep
    ) -> None:
        self._source, self._parallel, self._config, self._dtype = source, parallel, config, dtype
        self._keep = keep
        self.encoder: UMT5TextEncoder | None = None
        if parallel.rank == 0 and source.is_here():
            self.encoder = self._open()

    def encode(self, prompt: str, seed: int) -> Tensor:
        """(1, L, E), the same for every seed. Every rank must ask for it.

        Raises:
            CheckpointError: the encoder is not there, or cannot be read.
            PromptError: the prompt cannot be cleaned without ftfy.
        """
        return self.encode_all([prompt], seed)[0]

    def encode_all(self, prompts: Sequence[str | None], seed: int) -> list[Tensor]:
        """Several at once, since an encoder that is given up between prompts is then read but once. None is the empty
        prompt."""
        made: list[Tensor] = []

        def of(number: int) -> Tensor:
            if not made:
                made.extend(self._on_rank_0([prompt or "" for prompt in prompts]).split(1))
            return made[number]

        count = range(len(prompts))
        return [share_embeds(partial(of, n), self._parallel, self._config, self._dtype) for n in count]

    def opening(self, channels: int, height: int, width: int) -> None:
        """Nothing is given: a stream of Wan begins with noise."""

    def _on_rank_0(self, prompts: Sequence[str]) -> Tensor:
        self.encoder = self.encoder or self._open()
        return self.encoder.encode(prompts)

    def _open(self) -> UMT5TextEncoder:
        return UMT5TextEncoder.from_pretrained(
            self._source, device=self._parallel.device, text_len=self._config.text_len, keep=self._keep
        )


def share_embeds(
    make: Callable[[], Tensor], parallel: SequenceParallel, config: DiTConfig, dtype: torch.dtype
) -> Tensor:
    """The text embeddings that rank 0 makes, (1, L, E), on every rank.

    Raises:
        ConfigError: on every rank, if they are not of the model's size.
    """
    shape = (1, config.text_len, config.text_dim)

    def made() -> Tensor:
        embeds = make()
        if embeds.shape != shape:
            raise ConfigError(f"text embeddings have shape {tuple(embeds.shape)}, the model takes {shape}")
        return embeds

    return parallel.denoisers.from_first("text", made, shape, dtype, parallel.device)
