"""Videos that the DiT made, less sharp than what the encoder gives: what the decoder is trained on last."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from causalrope_sp.config import SamplerConfig
from causalrope_sp.grid import Chunk, LatentGrid
from causalrope_sp.models.causal_dit import CausalDiT
from causalrope_sp.sampling.sampler import sample_chunks
from causalrope_sp.toybox.chart import chart

from .codec import GeneratedVideos
from .dit import SAMPLER, STREAM
from .kept import fingerprint, kept, progress
from .latents import Latents, mean_on_objects
from .training import rank

SEED = 31_000_000
FRAMES = 21  # latent frames of a video: 81 pixel frames
AT_ONCE = 32


@torch.inference_mode()
def make_videos(
    path: Path,
    models: Sequence[tuple[CausalDiT, SamplerConfig, int]],
    scenes: Latents,
    grid: LatentGrid,
) -> GeneratedVideos:
    """Videos of scenes, so many by each of the models, or what `path` holds; see `kept`. They are made where the models
    are and kept on the CPU, where the scenes are."""
    total = sum(count for *_, count in models)

    def make() -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(SEED + rank())
        picks, parts = list[Tensor](), list[Tensor]()
        for model, sampler, count in models:
            device = next(model.parameters()).device

            def noise(shape: tuple[int, ...], device: torch.device = device) -> Tensor:
                return torch.randn(shape, generator=generator).to(device)

            for _ in range(count // AT_ONCE):
                picks.append(scenes.draw(AT_ONCE, generator))
                embeds = scenes.embeds[picks[-1]].to(device)
                parts.append(sample(model, embeds, noise, grid, FRAMES, sampler).half().cpu())
                progress("making videos", AT_ONCE * len(parts), total)
        return {"number": torch.cat(picks), "latents": torch.cat(parts)}

    numbers = [
        x for model, sampler, count in models for x in (fingerprint(*model.parameters()), len(sampler.steps), count)
    ]
    saved = kept(path, [fingerprint(scenes.starts_N6), len(scenes.latents), *numbers], make)
    number, latents = saved["number"], saved["latents"]
    truth, objects = scenes.frames(number, 0, FRAMES)
    error = mean_on_objects((latents.float() - truth).square().mean(2).flatten(2), objects.flatten(2))
    specs = [scenes.scenes[n] for n in number.tolist()]
    return GeneratedVideos(latents, specs, scenes.starts_N6[number], error)


def sample(
    model: CausalDiT,
    embeds: Tensor,
    noise_of: Callable[[tuple[int, ...]], Tensor],
    grid: LatentGrid,
    frames: int,
    sampler: SamplerConfig = SAMPLER,
) -> Tensor:
    """Samples the latents of `frames` frames after the chart, (B, F, C, X, X), on the model's device.

    Args:
        model: the DiT.
        embeds: the text embeddings, (B, L, W), on the model's device.
        noise_of: draws noise of a shape on the model's device.
        grid: the latent frame in tokens.
        frames: how many latent frames.
        sampler: the denoising steps.
    """
    size = (len(embeds), model.config.in_channels, grid.latent_height, grid.latent_width)

    def noise(chunk: Chunk, _: int) -> Tensor:
        return noise_of((size[0], chunk.frames, *size[1:]))

    text, still = embeds.to(model.dtype), chart(*size)
    chunks = sample_chunks(model, text, noise, grid, frames, stream=STREAM, sampler=sampler, initial_latents=still)
    return torch.cat([chunk.latents.clone() for chunk in chunks], 1)
