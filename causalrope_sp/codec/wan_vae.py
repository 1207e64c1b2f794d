"""The Wan VAE as a codec: streams that keep the state of its causal convolutions between chunks.

A stream's first latent frame is computed by itself. Later ones are computed together where they are small, as otherwise
the work around the arithmetic would outweigh it, and one by one where they are large, as the memory for them would. The
result does not depend by a bit on how a video is cut into chunks.

Shapes: B batch, F latent frames, C latent channels, T pixel frames, H×W latent size; pixels are in [-1, 1].
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from causalrope_sp.codec.conv_state import ConvCall, ConvState, ForkableStream, is_trained
from causalrope_sp.codec.interface import stream_pieces
from causalrope_sp.codec.wan_vae_config import WanVaeConfig
from causalrope_sp.codec.wan_vae_model import WanVae, patchify, unpatchify
from causalrope_sp.distributed.halo import SpatialShards

_TOGETHER = 2**20  # numbers in the widest layer of latent frames that are computed together


class WanCodec:
    """A `Codec` that runs a `WanVae`.

    Args:
        vae: the VAE, which is set to eval mode without gradients.
    """

    name = "wan"

    def __init__(self, vae: WanVae) -> None:
        self.vae = vae.eval().requires_grad_(False)
        self.channels = vae.config.z_dim
        self.temporal_stride = vae.config.scale_factor_temporal
        self.spatial_stride = vae.config.scale_factor_spatial

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that it computes in."""
        return self.vae.post_quant_conv.weight.dtype

    @property
    def device(self) -> torch.device:
        """The device that computes."""
        return self.vae.post_quant_conv.weight.device

    def decoder(self, spatial_shards: SpatialShards | None = None, state: ConvState | None = None) -> WanDecoderStream:
        """Starts a stream that decodes; see `Codec.decoder`."""
        return WanDecoderStream(self.vae, spatial_shards, state)

    def decoder_state_shapes(self, frames: int, batch: int, height: int, width: int) -> dict[str, tuple[int, ...]]:
        """Computes what a decoder keeps between two calls; see `Codec.decoder_state_shapes`."""
        return self.vae.decoder.state_shapes(frames, batch, height, width)

    def encoder(self) -> WanEncoderStream:
        """Starts a stream that encodes; see `Codec.encoder`."""
        return WanEncoderStream(self.vae)


def wan_vae_of(codec: object) -> WanVae | None:
    """Returns the module of a codec that is a Wan VAE; None for another codec.

    Its weights are on the CPU if the codec is offloaded.
    """
    inner = getattr(codec, "codec", codec)
    return inner.vae if isinstance(inner, WanCodec) else None


class WanDecoderStream(ForkableStream):
    """A `DecoderStream` through the Wan VAE.

    Args:
        vae: the VAE.
        spatial_shards: how ranks share a picture; None decodes the whole picture.
        state: what another stream has kept, to go on from there; None starts a video.

    Attributes:
        state: what it keeps between two calls.
    """

    def __init__(
        self, vae: WanVae, spatial_shards: SpatialShards | None = None, state: ConvState | None = None
    ) -> None:
        super().__init__(state, vae.decoder.state_shapes)
        self._vae, self._spatial_shards = vae, spatial_shards

    def decode(self, latents_BFCHW: Tensor) -> Tensor:
        """Decodes the next latent frames; see `DecoderStream.decode`."""
        vae, shards = self._vae, self._spatial_shards
        mean, std = _statistics(vae, latents_BFCHW)
        if shards is not None:
            latents_BFCHW = shards.mine(latents_BFCHW)
        batch, frames = latents_BFCHW.shape[:2]
        self.check_state(latents_BFCHW)
        together = 1 if shards is not None else frames_together(vae.config, latents_BFCHW.shape[-2:].numel() * batch)
        cuts = pairwise(_cuts(frames, together, self.state.started))
        pieces = [self._decode(latents_BFCHW[:, start:stop] * std + mean) for start, stop in cuts]
        return (torch.cat(pieces) if len(pieces) > 1 else pieces[0]).transpose(0, 1)

    def _decode(self, latents_BFCHW: Tensor) -> Tensor:
        """Decodes latent frames together, to (T, B, 3, H·stride, W·stride)."""
        vae, (batch, frames) = self._vae, latents_BFCHW.shape[:2]
        call = ConvCall(self.state, batch, frames, not self.state.started, self._spatial_shards)
        pixels = vae.decoder(vae.post_quant_conv(_frames_in_order(latents_BFCHW, vae)), call)
        return unpatchify(pixels, vae.config.patch_size or 1).unflatten(0, (-1, batch))


class WanEncoderStream:
    """An `EncoderStream` through the Wan VAE: every latent frame is there as soon as its own pixel frames are.

    Args:
        vae: the VAE.
        state: what an earlier stream has kept, to go on from there; None starts a video.

    Attributes:
        state: what it keeps between two calls.
    """

    def __init__(self, vae: WanVae, state: ConvState | None = None) -> None:
        self._vae = vae
        self.state = ConvState() if state is None else state

    def encode(self, pixels_BT3HW: Tensor) -> Tensor:
        """Encodes the next pixel frames; see `EncoderStream.encode`."""
        vae = self._vae
        config, batch = vae.config, len(pixels_BT3HW)
        sizes = stream_pieces(pixels_BT3HW.shape[1], config.scale_factor_temporal, self.state.started)
        latent_pixels = pixels_BT3HW.shape[-2:].numel() // config.scale_factor_spatial**2
        together = frames_together(config, latent_pixels * batch)
        ends = [0, *torch.tensor(sizes).cumsum(0).tolist()]
        cuts = pairwise(_cuts(len(sizes), together, self.state.started))
        means = torch.cat(
            [self._encode(pixels_BT3HW[:, ends[start] : ends[stop]], stop - start) for start, stop in cuts]
        ).transpose(0, 1)
        mean, std = _statistics(vae, means)
        return (means - mean) / std

    def _encode(self, pixels_BT3HW: Tensor, latent_frames: int) -> Tensor:
        """Encodes pixel frames together to the means of latent frames, (F, B, C, H, W)."""
        vae, batch = self._vae, len(pixels_BT3HW)
        call = ConvCall(self.state, batch, latent_frames, not self.state.started)
        hidden = vae.encoder(_frames_in_order(pixels_BT3HW, vae, vae.config.patch_size or 1), call)
        return vae.quant_conv(hidden)[:, : vae.config.z_dim].unflatten(0, (-1, batch))


def frames_together(config: WanVaeConfig, latent_pixels: int) -> int:
    """Returns how many latent frames are computed together.

    Args:
        config: the sizes of the VAE.
        latent_pixels: the pixels of a latent frame, times the videos of a batch.
    """
    area = latent_pixels * (config.scale_factor_spatial // (config.patch_size or 1)) ** 2
    width = max(config.encoder_widths[1], config.decoder_widths[-1])
    return max(1, _TOGETHER // max(1, area * width * config.scale_factor_temporal))  # a frame may yet prove too small


def _cuts(frames: int, together: int, started: bool) -> list[int]:
    """Returns where a call's latent frames are cut: the first one of a stream apart, then so many together."""
    start = 0 if started else 1
    return [*range(start), *range(start, frames, together), frames]


def _frames_in_order(x_BTCHW: Tensor, vae: WanVae, patch: int = 1) -> Tensor:
    """Returns frames with time outermost, patchified, on a CPU in channels-last order."""
    frames = patchify(x_BTCHW.transpose(0, 1).flatten(0, 1), patch)
    if frames.device.type == "cpu" and not is_trained(frames, vae.post_quant_conv.weight):
        return frames.contiguous(memory_format=torch.channels_last)
    return frames.contiguous()


def _statistics(vae: WanVae, like: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the mean and standard deviation that each latent channel is normalized by, (C, 1, 1)."""
    mean, std = (
        torch.tensor(values, dtype=like.dtype, device=like.device).view(-1, 1, 1)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return mean, std
