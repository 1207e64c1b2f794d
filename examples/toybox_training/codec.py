"""Stage 1, the codec: diffusers' Wan VAE, small, as an autoencoder with a fixed latent noise.

Clips grow from 5 frames, where most is learned, to 17, 33 and 65: a codec that has only seen short clips drifts in
colour when it streams long ones.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan

from causalrope_sp.codec.wan_vae import WanDecoderStream, WanEncoderStream
from causalrope_sp.toybox.scenes import PLACE_VARIABLES, random_scene, render

from .training import Training, processes, rank

SHAPE = {
    "patch_size": 2,
    "in_channels": 12,
    "out_channels": 12,
    "base_dim": 16,
    "dim_mult": [1, 2, 4],
    "temperal_downsample": [True, True],
    "num_res_blocks": 1,
    "z_dim": 16,
    "scale_factor_spatial": 8,
}
SEED, STATISTICS_SEED = 10_000_000, 20_000_000
LATENT_NOISE = 0.1  # keeps the latents from carrying what a DiT could never predict
LATENT_PENALTY = 1e-4  # on their square, so that they do not grow out of the noise


def new_codec(mean: list[float] | None = None, std: list[float] | None = None) -> AutoencoderKLWan:
    """The untrained codec; its latents are normalised by `mean` and `std` a channel, or not at all."""
    channels = SHAPE["z_dim"]
    return AutoencoderKLWan(**SHAPE, latents_mean=mean or [0.0] * channels, latents_std=std or [1.0] * channels)


def train_codec(path: Path, size: int, steps: int, stop: int, lr: float, device: torch.device) -> AutoencoderKLWan:
    """Trains for `stop` of `steps` steps, resuming from `path`; returns the averaged codec."""
    torch.manual_seed(0)
    training = Training(new_codec().to(device), path, lr, lambda _, p: p.ndim >= 4 and p.shape[0] > 3, average=0.995)
    while training.step < stop:
        progress = training.step / steps
        generator = torch.Generator().manual_seed(SEED + processes() * training.step + rank())
        count, frames = _clips(progress, training.step)
        scenes = [random_scene(generator) for _ in range(count)]
        places = torch.rand(count, PLACE_VARIABLES, generator=generator)
        pixels = render(scenes, places, torch.arange(frames), size).transpose(1, 2).to(device) * 2 - 1
        with torch.autocast(device.type, torch.bfloat16):
            latents = WanEncoderStream(training.model).encode(pixels)
            noise = torch.randn(latents.shape, generator=generator).to(device)
            back = WanDecoderStream(training.model).decode(latents + LATENT_NOISE * noise)
        difference = back.float() - pixels
        mse = difference.square().mean()
        loss = mse + 0.05 * difference.abs().mean() + LATENT_PENALTY * latents.float().square().mean()
        warm = min(1, (training.step + 1) / 100)
        fall = 1 if progress < 0.3 else max(0.02, 0.5 + 0.5 * math.cos(math.pi * (progress - 0.3) / 0.7))
        training.update(loss, warm * fall, {"psnr_db": -10 * math.log10(mse.item() / 4)})
    training.save()
    return training.ema


@torch.inference_mode()
def save_codec(codec: AutoencoderKLWan, folder: Path, size: int) -> None:
    """Writes the codec in bfloat16, its latents normalised by their mean and deviation a channel over 256 scenes."""
    generator = torch.Generator().manual_seed(STATISTICS_SEED)
    parts = []
    for _ in range(16):
        scenes = [random_scene(generator) for _ in range(16)]
        places = torch.rand(16, PLACE_VARIABLES, generator=generator)
        pixels = render(scenes, places, torch.arange(33), size).transpose(1, 2) * 2 - 1
        parts.append(WanEncoderStream(codec).encode(pixels.to(next(codec.parameters()).device)).cpu())
    by_channel = torch.cat(parts).transpose(0, 2).flatten(1)
    mean, std = ([round(v, 5) for v in of(1).tolist()] for of in (by_channel.mean, by_channel.std))
    normalised = new_codec(mean, std)
    normalised.load_state_dict(codec.state_dict())
    normalised.to(torch.bfloat16).save_pretrained(folder)


def _clips(progress: float, step: int) -> tuple[int, int]:
    """How many clips of how many frames a batch holds."""
    if progress < 0.3:
        return 12, 5
    if progress < 0.65 or (progress < 0.9 and step % 2):
        return 4, 17
    return (2, 33) if progress < 0.9 else (1, 65)
