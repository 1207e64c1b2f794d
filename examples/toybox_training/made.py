"""Videos that the DiT made, less sharp than what the encoder gives: what the decoder is trained on last."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from causalrope_sp.config import SamplerConfig
from causalrope_sp.grid import Chunk, LatentGrid
from causalrope_sp.models.causal_dit import CausalDiT
from causalrope_sp.sampling.sampler import sample_chunks
from causalrope_sp.toybox.chart import chart

from .codec import Made
from .dit import STREAM
from .kept import BATCH, fingerprint, kept, progress
from .latents import Latents, draw_scenes
from .training import processes, rank

SEED = 31_000_000
FRAMES = 21  # latent frames of a video: 81 pixel frames
AT_ONCE = 32


@torch.inference_mode()
def make_videos(
    path: Path,
    models: Sequence[tuple[CausalDiT, SamplerConfig, int]],
    scenes: Latents,
    scene_seed: int,
    grid: LatentGrid,
) -> Made:
    """Videos of scenes that were encoded from `scene_seed`: so many by each of the models, or what `path` holds; see
    `kept`."""
    total = sum(count for *_, count in models)

    def make() -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(SEED + rank())
        picks, parts = list[torch.Tensor](), list[torch.Tensor]()
        for model, sampler, count in models:
            for _ in range(count // AT_ONCE):
                picks.append(scenes.draw(AT_ONCE, generator))
                parts.append(_make(model, sampler, scenes.embeds[picks[-1]], scenes.latents.shape[2:], grid, generator))
                progress("making videos", AT_ONCE * len(parts), total)
        return {"number": torch.cat(picks), "latents": torch.cat(parts)}

    numbers = [x for model, sampler, count in models for x in (fingerprint(model), len(sampler.steps), count)]
    saved = kept(path, [scene_seed, len(scenes.latents), *numbers], make)
    number, latents = saved["number"], saved["latents"]
    truth, objects = scenes.frames(number, 0, FRAMES)
    error = ((latents.float() - truth).square().mean(2) * objects).sum((2, 3)) / objects.sum((2, 3)).clamp(min=1)
    drawn = [draw_scenes(scene_seed + rank() + processes() * (n // BATCH)) for n in number.tolist()]
    specs = [specs[n % BATCH] for (specs, _), n in zip(drawn, number.tolist(), strict=True)]
    starts = torch.stack([starts[n % BATCH] for (_, starts), n in zip(drawn, number.tolist(), strict=True)])
    return Made(latents, specs, starts, error)


def _make(
    model: CausalDiT,
    sampler: SamplerConfig,
    embeds: torch.Tensor,
    size: Sequence[int],
    grid: LatentGrid,
    generator: torch.Generator,
) -> torch.Tensor:
    def noise(chunk: Chunk, _: int) -> torch.Tensor:
        return torch.randn(len(embeds), chunk.frames, *size, generator=generator)

    still = chart(len(embeds), *size)
    text = embeds.to(model.dtype)
    chunks = sample_chunks(model, text, noise, grid, FRAMES, stream=STREAM, sampler=sampler, initial_latents=still)
    return torch.cat([chunk.latents.half().clone() for chunk in chunks], 1)
