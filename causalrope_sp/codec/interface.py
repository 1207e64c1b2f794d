"""What a codec is to the rest: two kinds of stream, and how many pixels and channels a latent number stands for.

Latents are as the DiT has them: whatever a codec needs to be undone or scaled, its streams do.

Shapes: B batch, F latent frames, C latent channels, T pixel frames, H×W latent size; pixels are in [-1, 1].
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from causalrope_sp.distributed.halo import SpatialShards
from causalrope_sp.errors import ConfigError


class DecoderStream(Protocol):
    """Decodes one video, chunk after chunk: bit for bit the frames of decoding it in one call, in constant memory."""

    def decode(self, latents_BFCHW: Tensor) -> Tensor:
        """The pixel frames of the next latent frames, (B, T, 3, H·stride, W·stride), not clamped.

        The stream's first latent frame gives one pixel frame, every other one `temporal_stride`.
        """
        ...


class EncoderStream(Protocol):
    """Encodes one video, piece after piece: bit for bit the latents of encoding it in one call, in constant memory."""

    def encode(self, pixels_BT3HW: Tensor) -> Tensor:
        """The latent frames that the next pixel frames complete, (B, F, C, H, W), F ≥ 0.

        A stream takes 1 + n strides pixel frames at first, then n strides.
        """
        ...


class Codec(Protocol):
    """A loaded codec. Its streams share nothing but the weights."""

    @property
    def name(self) -> str: ...

    @property
    def channels(self) -> int:
        """C."""
        ...

    @property
    def temporal_stride(self) -> int: ...

    @property
    def spatial_stride(self) -> int: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def device(self) -> torch.device: ...

    def decoder(self, spatial_shards: SpatialShards | None = None) -> DecoderStream:
        """With `strips` one that takes whole latents, as every rank does, and gives this rank's strip of the pixels."""
        ...

    def encoder(self) -> EncoderStream: ...


def stream_pieces(count: int, stride: int, started: bool) -> list[int]:
    """Into which pieces an encoder stream cuts `count` pixel frames: the very first frame alone, then by strides.

    Raises:
        ConfigError: the number is not 1 + n strides in the first call or n strides in a later one.
    """
    first = 0 if started else 1
    if count < 1 or (count - first) % stride:
        raise ConfigError(f"cannot encode {count} pixel frames: a stream takes 1 + {stride}n at first, then {stride}n")
    return [1] * first + [stride] * ((count - first) // stride)
