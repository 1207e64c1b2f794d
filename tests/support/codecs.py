"""A small VAE of Wan's layout, of diffusers and of this library, and a small TAEHV."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKLWan

from causalrope_sp.codec import Codec
from causalrope_sp.codec.taehv import TaehvCodec
from causalrope_sp.codec.taehv_model import Taehv, TaehvConfig
from causalrope_sp.codec.wan_vae import WanCodec
from causalrope_sp.codec.wan_vae_config import WanVaeConfig
from causalrope_sp.codec.wan_vae_model import WanVae

CHANNELS = 4
CODECS = ("wan", "wan with shortcuts", "taehv")


def wan_vae_like(vae: AutoencoderKLWan) -> WanVae:
    """Makes this library's module of diffusers' one: the same sizes and weights, without gradients."""
    made = WanVae(WanVaeConfig.from_json(vae.config)).to(vae.dtype)
    made.load_state_dict(vae.state_dict())
    return made.eval().requires_grad_(False)


def small_wan_vae(residual: bool) -> AutoencoderKLWan:
    """Makes a VAE of random weights: Wan 2.1's blocks, or those with shortcuts, which need a video's first frame."""
    torch.manual_seed(0)
    return AutoencoderKLWan(
        base_dim=4,
        z_dim=CHANNELS,
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        in_channels=12,
        out_channels=12,
        patch_size=2,
        is_residual=residual,
        latents_mean=[0.5, -1.0, 0.25, 2.0],
        latents_std=[1.5, 0.5, 2.0, 0.75],
    )


def small_codec(kind: str, dtype: torch.dtype) -> Codec:
    """Makes one of `CODECS`, of random weights."""
    torch.manual_seed(0)
    if kind == "taehv":
        config = TaehvConfig(CHANNELS, encoder_width=4, widths=(8, 6, 4, 4), pools=(2, 2, 1), grows=(1, 2, 2), patch=2)
        model = Taehv(config)
        for parameter in model.parameters():
            parameter.data.mul_(2)  # so that a frame seen too much or too little shows
        return TaehvCodec(model.to(dtype))
    return WanCodec(wan_vae_like(small_wan_vae(kind != "wan").to(dtype)))
