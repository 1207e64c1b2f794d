"""What a codec takes of a device, from its file's headers: weights and what a decoder keeps are exact, what it needs
while it decodes is an estimate.

The estimate is so many times the widest frames that a decoder makes of a latent frame, as torch's tensors that are
alive at once were counted at several sizes (the tests count again), and the pixel frames that are decoded already. What
cuDNN takes beside them is not in it. Encoding takes less than decoding.

Shapes: H×W latent size. Bytes are those of float32, in which codecs run.
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

_ITEM = 4
_WAN_ALIVE, _TAEHV_ALIVE = 6.6, 2.3
_WAN_KEPT = 2  # frames that a causal convolution over three keeps


@dataclass(frozen=True)
class CodecFootprint:
    """Bytes of the weights, of what a decoder keeps between chunks, and of what it needs beside while it decodes;
    `stride` is the pixels that the side of a latent stands for."""

    weights: int
    state: int
    activations: int
    stride: int

    def share(self, of: Fraction) -> CodecFootprint:
        """On a rank that decodes so much of the picture."""
        return replace(self, state=ceil(self.state * of), activations=ceil(self.activations * of))


def codec_footprint(
    path: str | PathLike[str], kind: str | None, height: int, width: int, frames: int
) -> CodecFootprint:
    """Of the codec in a file or folder, for `frames` latent frames at once, whose pixel frames are height×width.

    Raises:
        CheckpointError, ConfigError: as `load_codec`.
    """
    files, found = open_codec(path, kind)
    if found == "wan":
        return wan_footprint(vae_on_meta(files), height, width, frames)
    return taehv_footprint(taehv_on_meta(files), height, width, frames)


def wan_2_1_footprint(height: int, width: int, frames: int) -> CodecFootprint:
    """Of Wan 2.1's own VAE, which is what diffusers' class is without a configuration."""
    from diffusers import AutoencoderKLWan

    with torch.device("meta"):
        return wan_footprint(AutoencoderKLWan.from_config({}), height, width, frames)


def wan_footprint(vae: AutoencoderKLWan, height: int, width: int, frames: int) -> CodecFootprint:
    from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d

    decoder, stride = vae.decoder, vae.config.scale_factor_spatial
    places, state = height // stride * (width // stride), 0
    parts = [decoder.conv_in, decoder.mid_block, *decoder.up_blocks, decoder.conv_out]
    for part in parts:
        kept = [m.in_channels for m in part.modules() if isinstance(m, WanCausalConv3d) and m.kernel_size[0] > 1]
        state += _WAN_KEPT * sum(kept) * places * _ITEM
        if getattr(part, "upsamplers", None) is not None:
            places *= 4
    widest = decoder.conv_out.in_channels * vae.config.scale_factor_temporal * places
    pixels = _earlier_pixels(height, width, frames, vae.config.scale_factor_temporal)
    return CodecFootprint(_bytes_of(vae), state, round(_WAN_ALIVE * widest * _ITEM) + pixels, stride)


def taehv_footprint(model: Taehv, height: int, width: int, frames: int) -> CodecFootprint:
    config, stages = model.config, len(model.config.grows)
    outer = height // config.patch * (width // config.patch)
    state = widest = 0
    rate = 1
    for stage, (grow, wide, narrow) in enumerate(zip(config.grows, config.widths, config.widths[1:])):
        places = outer // 4 ** (stages - stage)
        state += MEMORIES * wide * places
        rate *= grow
        widest = max(widest, rate * max(wide, narrow) * 4 * places)
    pixels = _earlier_pixels(height, width, frames, prod(config.grows))
    stride = config.patch * 2**stages
    return CodecFootprint(_bytes_of(model), state * _ITEM, round(_TAEHV_ALIVE * widest * _ITEM) + pixels, stride)


def _earlier_pixels(height: int, width: int, frames: int, stride: int) -> int:
    return 3 * height * width * (frames - 1) * stride * _ITEM


def _bytes_of(module: torch.nn.Module) -> int:
    return _ITEM * sum(tensor.numel() for tensor in module.state_dict().values())
