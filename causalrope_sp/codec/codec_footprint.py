"""Device memory of a codec, from its file's headers: exact for the weights and for the state of a decoder, estimated
for the activations.

The activations are a measured factor times the widest frames that a decoder makes of one latent frame, plus the pixel
frames of the call that are decoded already. The factor is the number of such tensors that are alive at once, counted at
several sizes; the tests count again. Workspaces of cuDNN are not included. Encoding takes less than decoding.

Bytes are those of float32, in which codecs run.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction
from math import ceil, prod
from os import PathLike
from typing import TYPE_CHECKING

import torch

from causalrope_sp.codec.codec_loader import open_codec
from causalrope_sp.codec.taehv import MEMORIES, Taehv, taehv_on_meta
from causalrope_sp.codec.wan_vae_weights import vae_on_meta

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan

_ITEM = 4  # bytes of a number
_WAN_ALIVE, _TAEHV_ALIVE = 6.6, 2.3  # tensors of the widest size that are alive at once
_WAN_KEPT = 2  # frames that a causal convolution over 3 frames keeps


@dataclass(frozen=True)
class CodecFootprint:
    """The memory of a codec on a device.

    Attributes:
        weights: bytes of the weights.
        state: bytes that a decoder keeps between chunks.
        activations: bytes that a decoder needs in addition while it decodes.
        stride: pixels per side of a latent pixel.
    """

    weights: int
    state: int
    activations: int
    stride: int

    def share(self, of: Fraction) -> CodecFootprint:
        """Returns the footprint on a rank that decodes a part of the picture.

        Args:
            of: the part, above 0 and at most 1.
        """
        return replace(self, state=ceil(self.state * of), activations=ceil(self.activations * of))


def codec_footprint(
    path: str | PathLike[str], kind: str | None, height: int, width: int, frames: int
) -> CodecFootprint:
    """Computes the footprint of the codec in a file or folder.

    Args:
        path: as for `load_codec`.
        kind: as for `load_codec`.
        height: height of a pixel frame, in pixels.
        width: width of a pixel frame, in pixels.
        frames: latent frames that are decoded in one call.

    Returns:
        The footprint.

    Raises:
        CheckpointError, ConfigError: as `load_codec` raises them.
    """
    files, found = open_codec(path, kind)
    if found == "wan":
        return wan_footprint(vae_on_meta(files), height, width, frames)
    return taehv_footprint(taehv_on_meta(files), height, width, frames)


def wan_2_1_footprint(height: int, width: int, frames: int) -> CodecFootprint:
    """Computes the footprint of Wan 2.1's VAE, which is diffusers' class with its defaults; see `codec_footprint`."""
    from diffusers import AutoencoderKLWan

    with torch.device("meta"):
        return wan_footprint(AutoencoderKLWan.from_config({}), height, width, frames)


def wan_footprint(vae: AutoencoderKLWan, height: int, width: int, frames: int) -> CodecFootprint:
    """Computes the footprint of a Wan VAE, which may be on the meta device; see `codec_footprint`."""
    from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d

    decoder, stride = vae.decoder, vae.config.scale_factor_spatial
    positions, state = height // stride * (width // stride), 0
    parts = [decoder.conv_in, decoder.mid_block, *decoder.up_blocks, decoder.conv_out]
    for part in parts:
        kept = [m.in_channels for m in part.modules() if isinstance(m, WanCausalConv3d) and m.kernel_size[0] > 1]
        state += _WAN_KEPT * sum(kept) * positions * _ITEM
        if getattr(part, "upsamplers", None) is not None:
            positions *= 4
    widest = decoder.conv_out.in_channels * vae.config.scale_factor_temporal * positions
    pixels = _earlier_pixels(height, width, frames, vae.config.scale_factor_temporal)
    return CodecFootprint(_bytes_of(vae), state, round(_WAN_ALIVE * widest * _ITEM) + pixels, stride)


def taehv_footprint(model: Taehv, height: int, width: int, frames: int) -> CodecFootprint:
    """Computes the footprint of a TAEHV, which may be on the meta device; see `codec_footprint`."""
    config, stages = model.config, len(model.config.grows)
    outer = height // config.patch * (width // config.patch)
    state = widest = 0
    rate = 1
    for stage, (grow, wide, narrow) in enumerate(zip(config.grows, config.widths, config.widths[1:])):
        positions = outer // 4 ** (stages - stage)
        state += MEMORIES * wide * positions
        rate *= grow
        widest = max(widest, rate * max(wide, narrow) * 4 * positions)
    pixels = _earlier_pixels(height, width, frames, prod(config.grows))
    stride = config.patch * 2**stages
    return CodecFootprint(_bytes_of(model), state * _ITEM, round(_TAEHV_ALIVE * widest * _ITEM) + pixels, stride)


def _earlier_pixels(height: int, width: int, frames: int, stride: int) -> int:
    """Returns the bytes of the pixel frames that a call has decoded when it decodes its last latent frame."""
    return 3 * height * width * (frames - 1) * stride * _ITEM


def _bytes_of(module: torch.nn.Module) -> int:
    """Returns the bytes of a module's parameters and buffers."""
    return _ITEM * sum(tensor.numel() for tensor in module.state_dict().values())
