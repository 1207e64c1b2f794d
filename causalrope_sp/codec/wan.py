"""The Wan VAE, streaming: its causal convolutions keep their state between chunks.

diffusers' `AutoencoderKLWan` holds the layers; its own `decode` forgets the state after every call, so a video
decoded chunk by chunk with it would flicker at each seam. The two streams below walk the same layers, one latent
frame at a time as `decode` does, and keep the state. The frames are those of decoding everything at once.

Shapes: B batch, F latent frames, C latent channels, T pixel frames, H×W latent size; pixels are in [-1, 1].
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from causalrope_sp.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan


def load_codec(folder: Path, device: torch.device | str = "cpu") -> AutoencoderKLWan:
    """The VAE in a diffusers folder (config.json and diffusion_pytorch_model.safetensors), in float32.

    Raises:
        CheckpointError: a file that cannot be read, or weights that do not fit the configuration.
    """
    from diffusers import AutoencoderKLWan

    try:
        vae = AutoencoderKLWan.from_config(json.loads((folder / "config.json").read_text()))
        vae.load_state_dict(load_file(folder / "diffusion_pytorch_model.safetensors"))
    except (OSError, ValueError, RuntimeError, SafetensorError) as reason:
        raise CheckpointError(f"cannot read the codec in {folder}: {str(reason).splitlines()[0]}") from reason
    return vae.to(device).eval().requires_grad_(False)


def _causal_convolutions(module: nn.Module) -> int:
    from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d

    return sum(isinstance(m, WanCausalConv3d) for m in module.modules())


class WanDecoderStream:
    """Decodes one video, chunk after chunk."""

    def __init__(self, vae: AutoencoderKLWan) -> None:
        self._vae = vae
        self._state: list[Any] = [None] * _causal_convolutions(vae.decoder)
        self._started = False

    def decode(self, latents_BFCHW: Tensor) -> Tensor:
        """The pixel frames of the next latent frames, (B, T, 3, 8·H, 8·W), not clamped.

        The stream's first latent frame gives one pixel frame, every other one as many as the temporal stride.
        """
        from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify

        config = self._vae.config
        mean, std = _statistics(self._vae, latents_BFCHW)
        latents = self._vae.post_quant_conv((latents_BFCHW * std + mean).transpose(1, 2))
        pieces = []
        for frame in latents.split(1, dim=2):
            first, self._started = not self._started, True
            pieces.append(self._vae.decoder(frame, feat_cache=self._state, feat_idx=[0], first_chunk=first))
        pixels = torch.cat(pieces, 2)
        if config.patch_size is not None:
            pixels = unpatchify(pixels, patch_size=config.patch_size)
        return pixels.transpose(1, 2)


class WanEncoderStream:
    """Encodes one video, piece after piece."""

    def __init__(self, vae: AutoencoderKLWan) -> None:
        self._vae = vae
        self._state: list[Any] = [None] * _causal_convolutions(vae.encoder)
        self._started = False

    def encode(self, pixels_BT3HW: Tensor) -> Tensor:
        """The latent frames of the next pixel frames, (B, F, C, H/8, W/8), normalised.

        Raises:
            ConfigError: the number of pixel frames is not 1 + n strides in the first call or n strides in a later one.
        """
        from diffusers.models.autoencoders.autoencoder_kl_wan import patchify

        config = self._vae.config
        count, stride = pixels_BT3HW.shape[1], config.scale_factor_temporal
        first = 0 if self._started else 1
        if count < 1 or (count - first) % stride:
            raise ConfigError(
                f"cannot encode {count} pixel frames: a stream takes 1 + {stride}n at first, then {stride}n"
            )
        pixels = pixels_BT3HW.transpose(1, 2)
        if config.patch_size is not None:
            pixels = patchify(pixels, patch_size=config.patch_size)
        sizes = [1] * first + [stride] * ((count - first) // stride)
        self._started = True
        pieces = [self._vae.encoder(p, feat_cache=self._state, feat_idx=[0]) for p in pixels.split(sizes, dim=2)]
        moments = self._vae.quant_conv(torch.cat(pieces, 2))
        mean, std = _statistics(self._vae, moments)
        return (moments[:, : config.z_dim].transpose(1, 2) - mean) / std


def _statistics(vae: AutoencoderKLWan, like: Tensor) -> tuple[Tensor, Tensor]:
    """The per-channel mean and deviation that the DiT's latents are normalised by, shaped (C, 1, 1)."""

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=like.dtype, device=like.device).view(-1, 1, 1)

    return column(vae.config.latents_mean), column(vae.config.latents_std)
