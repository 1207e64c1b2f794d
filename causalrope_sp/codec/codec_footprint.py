"""Device memory of a codec, from its file's headers: exact for the weights, for those that a decoder derives from them
on a CPU and for the state of a decoder, estimated for the activations.

The activations are a measured factor times the widest frames that a decoder makes of the latent frames that it decodes
together, plus the pixel frames of the call that are decoded already. The factor is the number of such tensors that are
alive at once, counted at several sizes; the tests count again. Workspaces of cuDNN are not included. Encoding takes
less than decoding; on a CPU an encoder derives weights of its own, which are not counted (0.11 GB for Wan 2.1's).

Bytes are those of float32, in which codecs run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from math import ceil, prod
from os import PathLike

import torch

from causalrope_sp.codec.causal_conv import CausalConv, UpsampleConv
from causalrope_sp.codec.codec_loader import open_codec
from causalrope_sp.codec.taehv_model import Taehv, taehv_on_meta
from causalrope_sp.codec.wan_vae import frames_together
from causalrope_sp.codec.wan_vae_config import WanVaeConfig
from causalrope_sp.codec.wan_vae_layers import UpBlock
from causalrope_sp.codec.wan_vae_model import WanDecoder, WanVae
from causalrope_sp.codec.wan_vae_weights import vae_on_meta
from causalrope_sp.devices import on_meta

_ITEM = 4  # bytes of a number
_MANY = 2  # latent frames of a stream whose state grows no more
# tensors of the widest size that are alive at once; of a Wan VAE by whether its stages have shortcuts
_WAN_ALIVE, _TAEHV_ALIVE = {False: 5.2, True: 9.6}, 2.3


@dataclass(frozen=True)
class CodecFootprint:
    """The memory of a codec on a device.

    Attributes:
        weights: bytes of the weights.
        derived: bytes of weights that a decoder computes from these on a CPU, at its first chunk, and keeps.
        state: bytes that a decoder keeps between chunks.
        activations: bytes that a decoder needs in addition while it decodes.
        stride: pixels per side of a latent pixel.
        temporal_stride: pixel frames of every latent frame but the first.
    """

    weights: int
    derived: int
    state: int
    activations: int
    stride: int
    temporal_stride: int

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


def published_footprint(config: WanVaeConfig, height: int, width: int, frames: int) -> CodecFootprint:
    """Computes the footprint of a Wan VAE of these sizes, such as `wan_vae_config.WAN_2_1`; see `codec_footprint`."""
    with on_meta():
        return wan_footprint(WanVae(config), height, width, frames)


def wan_footprint(vae: WanVae, height: int, width: int, frames: int) -> CodecFootprint:
    """Computes the footprint of a Wan VAE, which may be on the meta device; see `codec_footprint`."""
    decoder, config = vae.decoder, vae.config
    stride = config.scale_factor_spatial
    latent = height // stride, width // stride
    shapes = decoder.state_shapes(_MANY, 1, *latent)
    positions = prod(shapes[decoder.conv_out.key][-2:])
    widest = decoder.conv_out.in_channels * config.scale_factor_temporal * positions
    widest *= min(frames, frames_together(config, prod(latent)))
    pixels = _earlier_pixels(height, width, frames, config.scale_factor_temporal)
    activations = round(_WAN_ALIVE[config.is_residual] * widest * _ITEM) + pixels
    own = _bytes_of(vae), _derived_bytes(decoder), state_bytes(shapes)
    return CodecFootprint(*own, activations, stride, config.scale_factor_temporal)


def taehv_footprint(model: Taehv, height: int, width: int, frames: int) -> CodecFootprint:
    """Computes the footprint of a TAEHV, which may be on the meta device; see `codec_footprint`."""
    config, stages = model.config, len(model.config.grows)
    stride = config.patch * 2**stages
    outer = height // config.patch * (width // config.patch)
    state = state_bytes(model.decoder_state_shapes(_MANY, 1, height // stride, width // stride))
    widest, rate = 0, 1
    for stage, (grow, wide, narrow) in enumerate(zip(config.grows, config.widths, config.widths[1:])):
        positions = outer // 4 ** (stages - stage)
        rate *= grow
        widest = max(widest, rate * max(wide, narrow) * 4 * positions)
    pixels = _earlier_pixels(height, width, frames, prod(config.grows))
    activations = round(_TAEHV_ALIVE * widest * _ITEM) + pixels
    return CodecFootprint(_bytes_of(model), 0, state, activations, stride, prod(config.grows))


def state_bytes(shapes: Mapping[str, tuple[int, ...]], item: int = _ITEM) -> int:
    """Computes the bytes that a decoder keeps between two calls.

    Args:
        shapes: what `Codec.decoder_state_shapes` returns; of a whole picture, for what a saved session holds of it.
        item: bytes of a number.
    """
    return item * sum(map(prod, shapes.values()))


def _derived_bytes(decoder: WanDecoder) -> int:
    """Returns the bytes of the weights that a decoder derives from its own on a CPU."""
    derived, rate = 0, 1  # numbers; frames of a latent frame
    for part in (decoder.conv_in, decoder.mid_block, *decoder.up_blocks, decoder.conv_out):
        derived += sum(x.derived(rate) for x in part.modules() if isinstance(x, CausalConv | UpsampleConv))
        rate *= part.time_factor if isinstance(part, UpBlock) else 1
    return derived * _ITEM


def _earlier_pixels(height: int, width: int, frames: int, stride: int) -> int:
    """Returns the bytes of the pixel frames that a call has decoded when it decodes its last latent frame."""
    return 3 * height * width * (frames - 1) * stride * _ITEM


def _bytes_of(module: torch.nn.Module) -> int:
    """Returns the bytes of a module's parameters and buffers."""
    return _ITEM * sum(tensor.numel() for tensor in module.state_dict().values())
