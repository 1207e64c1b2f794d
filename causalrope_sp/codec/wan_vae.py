"""The Wan VAE, chunk by chunk: its causal convolutions keep their state between chunks.

The layers are those of diffusers' `AutoencoderKLWan`. Its own `decode` forgets the state after every call, so a video
that it decodes chunk by chunk flickers at each boundary. The two streams below run the same layers on one latent frame
at a time, as `decode` does, and keep the state. Nothing is computed over several latent frames at once, not even the
two pointwise convolutions, so that the result does not depend by a bit on how a video is cut into chunks.

Shapes: B batch, F latent frames, C latent channels, T pixel frames, H×W latent size; pixels are in [-1, 1].
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from causalrope_sp.codec.interface import stream_pieces
from causalrope_sp.codec.sharded_decoder import sharing_weights, split_convolutions
from causalrope_sp.distributed.halo import SpatialShards

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan
    from diffusers.models.autoencoders.autoencoder_kl_wan import WanAttentionBlock


class WanCodec:
    """A `Codec` that runs diffusers' `AutoencoderKLWan`.

    Args:
        vae: the VAE, which is set to eval mode without gradients.
    """

    name = "wan"

    def __init__(self, vae: AutoencoderKLWan) -> None:
        self.vae = vae.eval().requires_grad_(False)
        self.channels: int = vae.config.z_dim
        self.temporal_stride: int = vae.config.scale_factor_temporal
        self.spatial_stride: int = vae.config.scale_factor_spatial

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that it computes in."""
        return self.vae.post_quant_conv.weight.dtype

    @property
    def device(self) -> torch.device:
        """The device that computes."""
        return self.vae.post_quant_conv.weight.device

    def decoder(self, spatial_shards: SpatialShards | None = None) -> WanDecoderStream:
        """Starts a stream that decodes; see `Codec.decoder`."""
        return WanDecoderStream(self.vae, spatial_shards)

    def encoder(self) -> WanEncoderStream:
        """Starts a stream that encodes; see `Codec.encoder`."""
        return WanEncoderStream(self.vae)


def wan_vae_of(codec: object) -> AutoencoderKLWan | None:
    """Returns diffusers' module of a codec that is a Wan VAE; None for another codec.

    Its weights are on the CPU if the codec is offloaded.
    """
    inner = getattr(codec, "codec", codec)
    return inner.vae if isinstance(inner, WanCodec) else None


class WanDecoderStream:
    """A `DecoderStream` through the Wan VAE. `state` is what it keeps between two calls."""

    def __init__(self, vae: AutoencoderKLWan, spatial_shards: SpatialShards | None = None) -> None:
        self._vae, self._spatial_shards = vae, spatial_shards
        self._decoder = vae.decoder if spatial_shards is None else _split(vae.decoder, spatial_shards)
        self.state: list[Any] = [None] * _causal_convolutions(self._decoder)
        self._started = False

    def decode(self, latents_BFCHW: Tensor) -> Tensor:
        """Decodes the next latent frames; see `DecoderStream.decode`."""
        from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify

        config = self._vae.config
        mean, std = _statistics(self._vae, latents_BFCHW)
        if self._spatial_shards is not None:
            latents_BFCHW = self._spatial_shards.mine(latents_BFCHW)
        pieces = []
        for frame in (latents_BFCHW * std + mean).split(1, dim=1):
            first, self._started = not self._started, True
            latent = self._vae.post_quant_conv(frame.transpose(1, 2).contiguous())
            pieces.append(self._decoder(latent, feat_cache=self.state, feat_idx=[0], first_chunk=first))
        pixels = torch.cat(pieces, 2)
        if config.patch_size is not None:
            pixels = unpatchify(pixels, patch_size=config.patch_size)
        return pixels.transpose(1, 2)


class WanEncoderStream:
    """An `EncoderStream` through the Wan VAE: every latent frame is there as soon as its own pixel frames are.

    `state` is what it keeps between two calls.
    """

    def __init__(self, vae: AutoencoderKLWan) -> None:
        self._vae = vae
        self.state: list[Any] = [None] * _causal_convolutions(vae.encoder)
        self._started = False

    def encode(self, pixels_BT3HW: Tensor) -> Tensor:
        """Encodes the next pixel frames; see `EncoderStream.encode`."""
        from diffusers.models.autoencoders.autoencoder_kl_wan import patchify

        config = self._vae.config
        sizes = stream_pieces(pixels_BT3HW.shape[1], config.scale_factor_temporal, self._started)
        self._started = True
        outputs = []
        for piece in pixels_BT3HW.split(sizes, dim=1):
            pixels = piece.transpose(1, 2).contiguous()
            if config.patch_size is not None:
                pixels = patchify(pixels, patch_size=config.patch_size)
            hidden = self._vae.encoder(pixels, feat_cache=self.state, feat_idx=[0])
            outputs.append(self._vae.quant_conv(hidden)[:, : config.z_dim])
        means = torch.cat(outputs, 2).transpose(1, 2)
        mean, std = _statistics(self._vae, means)
        return (means - mean) / std


class SplitAttention(nn.Module):
    """diffusers' `WanAttentionBlock`, attention within a frame, for the queries of one spatial shard.

    Keys and values are those of the whole frame, which is gathered.

    Args:
        block: the block that it replaces and shares the weights of.
        spatial_shards: how ranks share a picture.
    """

    def __init__(self, block: WanAttentionBlock, spatial_shards: SpatialShards) -> None:
        super().__init__()
        self.norm, self.to_qkv, self.proj, self._spatial_shards = block.norm, block.to_qkv, block.proj, spatial_shards

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        """Returns the block's output for this rank's shard, of the shape of its input."""
        batch, channels = x_BCTHW.shape[:2]
        normed = self.norm(x_BCTHW.transpose(1, 2).flatten(0, 1))
        weight, bias = self.to_qkv.weight, self.to_qkv.bias
        q = functional.conv2d(normed, weight[:channels], bias[:channels])
        kv = functional.conv2d(self._spatial_shards.whole(normed), weight[channels:], bias[channels:])
        q, k, v = (part.flatten(2).transpose(1, 2).unsqueeze(1).contiguous() for part in (q, *kv.chunk(2, 1)))
        attended = functional.scaled_dot_product_attention(q, k, v).squeeze(1).transpose(1, 2)
        projected = self.proj(attended.reshape(normed.shape))
        return x_BCTHW + projected.unflatten(0, (batch, -1)).transpose(1, 2)


def _split(decoder: nn.Module, spatial_shards: SpatialShards) -> Any:
    """Returns a copy of a decoder for one spatial shard, with the same weights."""
    split = sharing_weights(decoder)
    split_convolutions(split, spatial_shards)
    attentions = split.mid_block.attentions
    for number, block in enumerate(attentions):
        attentions[number] = SplitAttention(block, spatial_shards)
    return split


def _causal_convolutions(module: nn.Module) -> int:
    """Counts the causal convolutions, each of which keeps a state."""
    from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d

    return sum(isinstance(m, WanCausalConv3d) for m in module.modules())


def _statistics(vae: AutoencoderKLWan, like: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the mean and standard deviation that each latent channel is normalized by, (C, 1, 1)."""

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=like.dtype, device=like.device).view(-1, 1, 1)

    return column(vae.config.latents_mean), column(vae.config.latents_std)
