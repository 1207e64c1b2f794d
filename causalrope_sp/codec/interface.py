"""The interface of a codec: a stream that decodes, a stream that encodes, and the strides between latents and pixels.

Latents are normalized as the DiT has them; a codec's streams undo and apply the normalization.

Shapes: B batch, F latent frames, C latent channels, T pixel frames, H×W latent size; pixels are in [-1, 1].
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from causalrope_sp.codec.conv_state import ConvState
from causalrope_sp.distributed.halo import SpatialShards
from causalrope_sp.errors import ConfigError


class DecoderStream(Protocol):
    """Decodes one video chunk by chunk, in constant memory, to the same bits as in one call."""

    def decode(self, latents_BFCHW: Tensor) -> Tensor:
        """Decodes the next latent frames.

        Args:
            latents_BFCHW: the latent frames that follow those of the call before.

        Returns:
            Their pixel frames, (B, T, 3, H·stride, W·stride), not clamped. The stream's first latent frame gives 1
            pixel frame, every other one `temporal_stride` pixel frames.

        Raises:
            ConfigError: in the first call of a stream that was given a state, the state does not fit the codec or these
                latents.
        """
        ...

    @property
    def state(self) -> ConvState:
        """What the stream keeps between two calls. The next call replaces tensors in it: `fork` one to keep it."""
        ...

    def fork(self) -> DecoderStream:
        """Returns a stream that goes on from here by itself, at once: it shares every tensor until either replaces it.

        With spatial shards, every rank must fork its stream, and use the forks in the same order.
        """
        ...


class EncoderStream(Protocol):
    """Encodes one video piece by piece, in constant memory, to the same bits as in one call.

    Where two calls are given the same pixels and leave the same state, the next one with these pixels gives the same
    latents.
    """

    @property
    def state(self) -> ConvState:
        """What the stream's layers keep between two calls, which the next call replaces."""
        ...

    def encode(self, pixels_BT3HW: Tensor) -> Tensor:
        """Encodes the next pixel frames.

        Args:
            pixels_BT3HW: the pixel frames that follow those of the call before: T = 1 + n·stride in the first call,
                n·stride in a later one.

        Returns:
            The latent frames that they complete, (B, F, C, H, W), F ≥ 0.

        Raises:
            ConfigError: T is another number.
        """
        ...


class Codec(Protocol):
    """A loaded codec. Its streams share nothing but the weights."""

    @property
    def name(self) -> str:
        """The kind of codec, "wan" or "taehv"."""
        ...

    @property
    def channels(self) -> int:
        """Latent channels C."""
        ...

    @property
    def temporal_stride(self) -> int:
        """Pixel frames of every latent frame but the first."""
        ...

    @property
    def spatial_stride(self) -> int:
        """Pixels per side of a latent pixel."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that it computes in."""
        ...

    @property
    def device(self) -> torch.device:
        """The device that computes."""
        ...

    def decoder(self, spatial_shards: SpatialShards | None = None, state: ConvState | None = None) -> DecoderStream:
        """Starts a stream that decodes.

        Args:
            spatial_shards: how ranks share a picture. Every rank then passes whole latents to the stream and gets its
                own shard of the pixels. None decodes the whole picture.
            state: what another stream has kept, to go on from there, of this rank's shard, on the codec's device and in
                its dtype; it is not changed. None starts a video.
        """
        ...

    def decoder_state_shapes(self, frames: int, batch: int, height: int, width: int) -> dict[str, tuple[int, ...]]:
        """Computes what a decoder keeps between two calls.

        Args:
            frames: latent frames that it has decoded.
            batch: B.
            height: H, in latent pixels.
            width: W, in latent pixels.

        Returns:
            The shapes of the tensors of its `ConvState` by their names.
        """
        ...

    def encoder(self) -> EncoderStream:
        """Starts a stream that encodes."""
        ...


def stream_pieces(count: int, stride: int, started: bool) -> list[int]:
    """Cuts the pixel frames of a call into pieces: the stream's first frame alone, then one stride each.

    Args:
        count: pixel frames of the call.
        stride: pixel frames of every latent frame but the first.
        started: whether the stream has encoded frames before.

    Returns:
        Pixel frames of each piece.

    Raises:
        ConfigError: `count` is not 1 + n·stride in the first call or n·stride in a later one.
    """
    first = 0 if started else 1
    if count < 1 or (count - first) % stride:
        raise ConfigError(f"cannot encode {count} pixel frames: a stream takes 1 + {stride}n at first, then {stride}n")
    return [1] * first + [stride] * ((count - first) // stride)
