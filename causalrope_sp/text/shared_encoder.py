"""Text embeddings on every rank: rank 0 runs UMT5 and broadcasts, so the other ranks need none of its files."""

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
    """A UMT5 encoder that runs on rank 0 and serves every rank.

    The encoder is opened at once where its files are found, and otherwise for the first prompt, so that a pipeline that
    is called with embeddings needs none.

    Args:
        source: where the weights and the tokenizer are.
        parallel: the ranks; rank 0 of them runs the encoder.
        config: the DiT's configuration, which has the size of the embeddings.
        dtype: the dtype of the embeddings.
        keep: where the weights are kept between two prompts: "device", "cpu" or "free".

    Attributes:
        encoder: None until the encoder is opened, and always on ranks other than 0.

    Raises:
        CheckpointError: the encoder's files are found and faulty.
    """

    def __init__(
        self, source: TextSource, parallel: SequenceParallel, config: DiTConfig, dtype: torch.dtype, keep: Keep
    ) -> None:
        self._source, self._parallel, self._config, self._dtype = source, parallel, config, dtype
        self._keep = keep
        self.encoder: UMT5TextEncoder | None = None
        if parallel.rank == 0 and source.is_here():
            self.encoder = self._open()

    def encode(self, prompt: str, seed: int) -> Tensor:
        """Encodes a prompt on rank 0 and broadcasts its embeddings. Every rank must call.

        Args:
            prompt: the prompt; only rank 0's counts.
            seed: has no effect; other encoders draw numbers from it.

        Returns:
            The embeddings on every rank, (1, L, E).

        Raises:
            CheckpointError: the encoder is missing, or cannot be read.
            PromptError: the prompt cannot be cleaned without ftfy.
        """
        return self.encode_all([prompt], seed)[0]

    def encode_all(self, prompts: Sequence[str | None], seed: int, pictured: bool = False) -> list[Tensor]:
        """Encodes several prompts at once, so that an encoder that is freed between prompts is read only once.

        Args:
            prompts: the prompts; None is the empty prompt.
            seed: has no effect.
            pictured: has no effect.

        Returns:
            The embeddings of each prompt on every rank, (1, L, E).

        Raises:
            CheckpointError, PromptError: as `encode` raises them.
        """
        made: list[Tensor] = []

        def of(number: int) -> Tensor:
            if not made:
                made.extend(self._on_rank_0([prompt or "" for prompt in prompts]).split(1))
            return made[number]

        count = range(len(prompts))
        return [share_embeds(partial(of, n), self._parallel, self._config, self._dtype) for n in count]

    def opening(self, channels: int, height: int, width: int) -> None:
        """Returns None: a stream of Wan begins with noise, without initial latents."""

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
    """Broadcasts text embeddings from rank 0. Every rank must call.

    Args:
        make: computes the embeddings; only rank 0 calls it.
        parallel: the ranks.
        config: the DiT's configuration, which has the size of the embeddings.
        dtype: the dtype of the embeddings.

    Returns:
        The embeddings on every rank, (1, L, E).

    Raises:
        ConfigError: on every rank, if the embeddings have another shape than the model takes, or are not finite
            floating-point numbers.
    """
    shape = (1, config.text_len, config.text_dim)

    def made() -> Tensor:
        embeds = make()
        if embeds.shape != shape:
            raise ConfigError(f"text embeddings have shape {tuple(embeds.shape)}, the model takes {shape}")
        if not embeds.is_floating_point() or embeds.layout != torch.strided or embeds.is_meta:
            raise ConfigError(
                f"text embeddings must be a dense floating-point tensor, not {embeds.dtype} {embeds.device}"
            )
        if not embeds.to(dtype).isfinite().all():
            name = str(dtype).removeprefix("torch.")
            raise ConfigError(
                f"text embeddings must be finite in {name}, and hold NaN or numbers beyond its range; in float16 load "
                "the model with dtype bfloat16 or float32"
            )
        return embeds

    return parallel.denoisers.from_first("text", made, shape, dtype, parallel.device)
