"""Stage 2, the training set: scenes rendered and encoded once.

Shapes: N videos, F latent frames, C channels, X latent width = height, L text tokens, E text width.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from causalrope_sp.codec.wan import WanEncoderStream
from causalrope_sp.toybox.scenes import PLACE_VARIABLES, random_scene, render
from causalrope_sp.toybox.text import encode_scene

BATCH = 16


@dataclass(frozen=True)
class Latents:
    """Encoded scenes: latents (N, F, C, X, X) in float16 and text embeddings (N, L, E)."""

    latents: Tensor
    embeds: Tensor


@torch.inference_mode()
def encode_scenes(codec: AutoencoderKLWan, path: Path, videos: int, frames: int, size: int, seed: int) -> Latents:
    """Renders and encodes `videos` scenes of `frames` pixel frames; reads `path` if it is there already.

    The codec is the one of stage 1, which does not normalise yet.
    """
    if not path.exists():
        device = next(codec.parameters()).device
        parts: list[tuple[Tensor, Tensor]] = []
        for batch in range(-(-videos // BATCH)):
            shard, within = divmod(batch, 16)  # the seeds that the shipped weights were trained on
            generator = torch.Generator().manual_seed(seed + 100 * shard + within)
            scenes = [random_scene(generator) for _ in range(BATCH)]
            places = torch.rand(BATCH, PLACE_VARIABLES, generator=generator)
            pixels = render(scenes, places, torch.arange(frames), size).transpose(1, 2).to(device) * 2 - 1
            latents = WanEncoderStream(codec).encode(pixels).cpu().half()
            parts.append(
                (latents, torch.stack([encode_scene(scene, p) for scene, p in zip(scenes, places, strict=True)]))
            )
            print(f"encoded {len(parts) * BATCH} of {videos} videos", end="\r", flush=True)
        latents, embeds = (torch.cat(column) for column in zip(*parts, strict=True))
        partial = path.with_suffix(".partial")
        torch.save({"latents": latents, "embeds": embeds}, partial)
        partial.replace(path)
    return Latents(**torch.load(path, weights_only=True))


def statistics(data: Latents) -> tuple[list[float], list[float]]:
    """Mean and deviation of every channel, as the codec's configuration keeps them."""
    latents = data.latents.float()
    return tuple([round(v, 5) for v in f(latents)] for f in (_mean, _std))  # type: ignore[return-value]


def _mean(latents: Tensor) -> list[float]:
    return latents.mean((0, 1, 3, 4)).tolist()


def _std(latents: Tensor) -> list[float]:
    return latents.transpose(0, 2).flatten(1).std(1).tolist()


def normalised(data: Latents, mean: list[float], std: list[float]) -> Latents:
    m, s = (torch.tensor(v).view(-1, 1, 1) for v in (mean, std))
    return Latents(((data.latents.float() - m) / s).half(), data.embeds)
