"""A chunk of latents and its conversion to a rank's tokens, shared by the autoregressive and the parallel sampler.

Shapes: B batch, F latent frames, C channels, H×W latent size, s tokens of a frame on this rank, S tokens of a whole
frame, E numbers in a token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from causalrope_sp.devices import send
from causalrope_sp.errors import ConfigError
from causalrope_sp.grid import Chunk, LatentGrid, Shard
from causalrope_sp.models.causal_dit import CausalDiT
from causalrope_sp.sampling.finite_chunks import FiniteCheck, check_finite


@dataclass(frozen=True)
class LatentChunk:
    """A finished chunk.

    Args:
        chunk: its number, start and length.
        latents: whole latent frames, (B, F, C, H, W), on every rank.
        finite: the pending check of its latents.
    """

    chunk: Chunk
    latents: Tensor
    finite: FiniteCheck

    def check_finite(self) -> None:
        """Waits for the latents. Raises ConfigError on every rank if they hold NaN or infinity."""
        self.finite.read()


@dataclass(frozen=True)
class ShardContext:
    """Converts whole latents to this rank's tokens, in the sampler's own dtype and on the model's device.

    Args:
        grid: the latent frame in tokens.
        shard: the tokens of a frame that this rank owns.
        batch: B.
        channels: C.
        device: where the model computes.
        dtype: of the sampler's state: float32, or float64 for a model in float64.
    """

    grid: LatentGrid
    shard: Shard
    batch: int
    channels: int
    device: torch.device
    dtype: torch.dtype

    @classmethod
    def of(cls, model: CausalDiT, grid: LatentGrid, shard: Shard, batch: int) -> ShardContext:
        """Makes the context of the streams of a model, with B = `batch`."""
        return cls(grid, shard, batch, model.config.in_channels, model.device, compute_dtype(model.dtype))

    def shape(self, frames: int) -> tuple[int, int, int, int, int]:
        """Returns the shape (B, F, C, H, W) of so many whole latent frames."""
        return self.batch, frames, self.channels, self.grid.latent_height, self.grid.latent_width

    def tokens(self, latents_BFCHW: Tensor) -> Tensor:
        """Returns this rank's tokens of whole latents, (B, F, s, E)."""
        own = self.grid.patchify(latents_BFCHW)[:, :, self.shard.start : self.shard.stop]
        return send(own.contiguous(), self.device, self.dtype)

    def checked_tokens(self, what: str, frames: int, latents_BFCHW: Tensor) -> Tensor:
        """Checks the shape of latents that come from a caller and returns this rank's tokens of them, (B, F, s, E).

        Args:
            what: names the latents in the message.
            frames: F, the latent frames that are expected.
            latents_BFCHW: whole latents.

        Raises:
            ConfigError: the latents have another shape than so many frames.
        """
        if latents_BFCHW.shape != self.shape(frames):
            raise ConfigError(f"{what} has shape {tuple(latents_BFCHW.shape)}, expected {self.shape(frames)}")
        return self.tokens(latents_BFCHW)

    def given_tokens(self, given: Tensor | None, initial: int, most: int) -> Tensor | None:
        """Checks the frames that are given within the first chunk and returns this rank's tokens of them.

        Args:
            given: `StreamOptions.given_frames`.
            initial: latent frames before the first chunk.
            most: latent frames of the first chunk.

        Raises:
            ConfigError: the latents do not fit, or not into the first chunk of the stream.
        """
        if given is None:
            return None
        self.check_initial(given)
        if initial or given.shape[1] > most:
            raise ConfigError(f"given_frames must be at most {most}, after no initial latents, not {given.shape[1]}")
        return self.tokens(given)

    def check_initial(self, latents: Tensor | None) -> None:
        """Raises ConfigError unless the initial latents are whole frames of this batch and grid, and finite."""
        if latents is not None and (latents.ndim != 5 or latents.shape != self.shape(latents.shape[1])):
            batch, _, *frame = self.shape(0)
            expected = ", ".join(map(str, (batch, "frames", *frame)))
            raise ConfigError(f"initial latents have shape {tuple(latents.shape)}, expected ({expected})")
        check_finite("initial latents", latents)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype of the sampler's state and of rotary angles: float32, or float64 for a model in float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_text(model: CausalDiT, embeds: Tensor, grid: LatentGrid) -> None:
    """Raises ConfigError unless the text embeddings and the grid fit the model, and the embeddings are finite."""
    config = model.config
    if embeds.ndim != 3 or embeds.shape[1:] != (config.text_len, config.text_dim):
        raise ConfigError(
            f"text embeddings have shape {tuple(embeds.shape)}, expected (batch, {config.text_len}, {config.text_dim})"
        )
    if grid.patch != config.patch_size[1:]:
        raise ConfigError(f"the grid's patch is {grid.patch}, the model's {config.patch_size[1:]}")
    check_finite("text embeddings", embeds)


def check_image(model: CausalDiT, embeds: Tensor | None, batch: int) -> None:
    """Raises ConfigError unless the image tokens fit the model, and are finite; None fits one without."""
    width = model.config.image_dim
    if (embeds is None) != (width == 0):
        expected = f"(batch, tokens, {width}), which the model reads" if width else "None, which the model takes"
        raise ConfigError(f"image embeddings must be {expected}, not {None if embeds is None else tuple(embeds.shape)}")
    if embeds is not None:
        check_image_embeds(embeds, batch, width)


def check_image_embeds(embeds: Tensor, batch: int, width: int) -> None:
    """Raises ConfigError unless image tokens are finite and of this batch and width."""
    if embeds.ndim != 3 or embeds.shape[::2] != (batch, width) or not embeds.shape[1]:
        raise ConfigError(f"image embeddings have shape {tuple(embeds.shape)}, expected ({batch}, tokens, {width})")
    check_finite("image embeddings", embeds)
