"""The variants of sampling that `vin.py` compares: what each makes, and what it costs by formula."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from videos import video_of

from causalrope_sp import CausalVideoPipeline, LatentGrid, SequenceParallel
from causalrope_sp.attention.build import build_strategy
from causalrope_sp.codec.pixels import to_uint8
from causalrope_sp.config import PRESETS, DiTConfig, StreamConfig
from causalrope_sp.diffusion.noise import keyed_generator, seeded_noise
from causalrope_sp.diffusion.schedule import model_timesteps
from causalrope_sp.grid import split_into_chunks
from causalrope_sp.planning.counts import cross_flops
from causalrope_sp.planning.machines import default_machine
from causalrope_sp.planning.strategy import choose_strategy
from causalrope_sp.planning.workload import Workload
from causalrope_sp.toybox.prompts import SceneSpec
from causalrope_sp.toybox.scenes import START_VARIABLES, render
from causalrope_sp.toybox.toybox_text import leave_open
from causalrope_sp.vin import PAPER_CHUNKS, PAPER_VIN, ParallelChunksConfig, sample_parallel_chunks
from causalrope_sp.vin.chunks import AssignedChunks, cut
from causalrope_sp.vin.fusion import join
from causalrope_sp.vin.parallel_forward import ParallelChunksForward
from causalrope_sp.vin.vin_cost import full_flops, video_flops

if TYPE_CHECKING:
    from causalrope_sp.pipeline.parallel_chunks import ParallelChunks

VARIANTS = (
    "VIN",
    "full attention",
    "autoregressive",
    "VIN without global tokens",
    "VIN without fusion",
    "VIN with guidance",
)
TRUTH = "rendered through the codec"
OPEN: dict[str, dict[str, bool]] = {"nothing": {}, "colours": {"colors": True}, "starts": {"starts": True}}
PAPER_STEPS = 50
LEVELS = (0.99, 0.98, 0.95, 0.9, 0.8, 0.5)


class Variants:
    """The models, loaded once, and a video of each variant."""

    def __init__(self) -> None:
        self.vin = CausalVideoPipeline.from_pretrained("toybox-vin", parallel_chunks="vin")
        self.flow = CausalVideoPipeline.from_pretrained("toybox-flow")
        assert self.vin.parts.parallel_chunks is not None, "asked for"
        self.parallel_chunks: ParallelChunks = self.vin.parts.parallel_chunks

    def video(self, variant: str, scene: SceneSpec, frames: int, seed: int, left_open: str = "nothing") -> np.ndarray:
        """uint8 (T, H, W, 3), from a text that leaves something open, see `OPEN`."""
        if variant == TRUTH:
            return self._rendered(scene, frames, seed)
        if variant == "autoregressive":
            return video_of(self.flow, scene.prompt(), num_frames=frames, seed=seed)
        pipe, count = self.vin, latent_frames(frames)
        channels = pipe.model.config.in_channels
        opening = pipe.text.opening(channels, pipe.settings().grid.latent_height, pipe.settings().grid.latent_width)
        vin, chunks = settings(variant, self.parallel_chunks, count)
        embeds = leave_open(pipe.text.encode(scene.prompt(), seed), **OPEN[left_open])
        noise = seeded_noise(seed, (1, channels, pipe.settings().grid.latent_height, pipe.settings().grid.latent_width))
        for output in sample_parallel_chunks(
            pipe.model,
            vin,
            embeds,
            noise,
            pipe.settings().grid,
            count,
            chunks=chunks,
            sampler=pipe.config.sampler,
            initial_latents=opening,
        ):
            latents = output.latents
        assert latents is not None, "the last step has the video"
        return self._decoded(latents, frames)

    @torch.inference_mode()
    def _rendered(self, scene: SceneSpec, frames: int, seed: int) -> np.ndarray:
        return self._decoded(self.latents(scene, frames, seed), frames)

    @torch.inference_mode()
    def _decoded(self, latents: torch.Tensor, frames: int) -> np.ndarray:
        pixels = to_uint8(self.vin.codec.decoder().decode(latents))[0, :frames]
        return pixels.movedim(1, -1).numpy()

    @torch.inference_mode()
    def latents(self, scene: SceneSpec, frames: int, seed: int) -> torch.Tensor:
        """Of the rendered scene, with the starts that its seed gives the text."""
        starts = torch.rand(1, START_VARIABLES, generator=keyed_generator(seed))
        whole = 4 * (latent_frames(frames) - 1) + 1
        pixels = render([scene], starts, torch.arange(whole), self.vin.height).transpose(1, 2) * 2 - 1
        return self.vin.codec.encoder().encode(pixels)

    def seams(self, frames: int) -> list[int]:
        """The first pixel frame of every chunk's own latent frames, but the first chunk's."""
        chunks = cut(latent_frames(frames), self.parallel_chunks.chunks)
        own = [
            AssignedChunks(chunks, self.parallel_chunks.chunks, n, len(chunks)).owned.start
            for n in range(1, len(chunks))
        ]
        return [1 + 4 * (frame - 1) for frame in own]


def latent_frames(frames: int) -> int:
    return 1 - (1 - frames) // 4


def settings(variant: str, parallel_chunks: ParallelChunks, frames: int) -> tuple[Any, ParallelChunksConfig]:
    """The network, or None, and the chunks of a variant that makes a video at once."""
    if variant == "full attention":
        return None, replace(parallel_chunks.chunks, chunk_frames=frames)
    if variant == "VIN without global tokens":
        return None, parallel_chunks.chunks
    if variant == "VIN without fusion":
        return parallel_chunks.vin, replace(parallel_chunks.chunks, fuse_above=1.0)
    if variant == "VIN with guidance":
        return parallel_chunks.vin, guided(parallel_chunks.chunks)
    return parallel_chunks.vin, parallel_chunks.chunks


def guided(chunks: ParallelChunksConfig) -> ParallelChunksConfig:
    """By global tokens, in 9 of toybox-vin's 25 steps."""
    return replace(chunks, global_guidance_scale=2.0, global_guidance_interval=(850, 1000))


def autoregressive_flops(config: DiTConfig, grid: LatentGrid, stream: StreamConfig, frames: int, steps: int) -> int:
    """Every chunk's denoise passes and its context pass, of which the last chunk has none."""
    work = Workload(config, grid, stream.window or frames, stream.chunk_frames, steps)
    total, chunks = 0, list(split_into_chunks(frames, stream.chunk_frames, start=1))
    for chunk in chunks:
        tokens, keys = chunk.frames * grid.tokens, min(chunk.stop, work.window) * grid.tokens
        attention = 4 * config.num_layers * tokens * keys * config.dim
        time_ = 2 * chunk.frames * config.dim * (config.freq_dim + 7 * config.dim)
        passes = steps if chunk == chunks[-1] else steps + 1
        total += passes * (work.linear_flops * tokens + cross_flops(work, tokens) + attention + time_)
    return total


def flops_of(variant: str, variants: Variants, frames: int) -> int:
    """FLOPs of a whole video."""
    config, grid, count = variants.vin.model.config, variants.vin.settings().grid, latent_frames(frames)
    steps = len(variants.vin.config.sampler.steps)
    if variant == "autoregressive":
        flow = variants.flow.config
        return autoregressive_flops(config, grid, flow.stream, count, len(flow.sampler.steps))
    if variant == "full attention":
        return steps * full_flops(config, grid, count, initial_frames=1)
    vin, chunks = settings(variant, variants.parallel_chunks, count)
    guided_steps = sum(map(chunks.guides, model_timesteps(variants.vin.config.sampler)))
    return video_flops(
        config, vin and vin.config, grid, count, chunks, steps, initial_frames=1, guided_steps=guided_steps
    )


@torch.inference_mode()
def velocity(
    variants: Variants, x: torch.Tensor, embeds: torch.Tensor, level: float, global_tokens: bool
) -> torch.Tensor:
    """The velocity of a whole video, (1, F, C, X, X), at a noise level from 0 to 1. Where chunks overlap, it is the
    earlier one's."""
    pipe, config = variants.vin, variants.parallel_chunks.chunks
    grid, parallel = pipe.settings().grid, SequenceParallel.single(device="cpu")
    assigned = AssignedChunks(cut(x.shape[1], config, 1), config)
    work = Workload(pipe.model.config, grid, config.chunk_frames + 1, 1, 1)
    layout = choose_strategy(work, default_machine(parallel.device), parallel)
    strategy = build_strategy(parallel, layout, work.grid, work.head_rings(layout.ulysses))
    vin = variants.parallel_chunks.vin if global_tokens else None
    state = ParallelChunksForward(pipe.model, vin, embeds, grid, assigned, 1, strategy, parallel)
    opening = pipe.text.opening(*x.shape[2:])
    assert opening is not None  # toybox begins every video with the same frame
    state.commit(grid.patchify(opening))
    return grid.unpatchify(join(state.velocities(grid.patchify(x), 1000 * level), config.overlap, fused=False))


@torch.inference_mode()
def held_out(variants: Variants, scenes: list[SceneSpec], frames: int) -> list[dict[str, Any]]:
    """The velocity's mean square error on rendered scenes at a few noise levels, with global tokens and without."""
    pipe, rows = variants.vin, list[dict[str, Any]]()
    cases = []
    for seed, scene in enumerate(scenes):
        clean = variants.latents(scene, frames, seed)
        noise = torch.randn(clean.shape, generator=keyed_generator(seed, 1))
        cases.append((clean, noise, pipe.text.encode(scene.prompt(), seed)))
    for left_open, what in OPEN.items():
        for level in LEVELS:
            errors: dict[bool, list[float]] = {True: [], False: []}
            for clean, noise, embeds in cases:
                x, said = (1 - level) * clean + level * noise, leave_open(embeds, **what)
                for use in (True, False):
                    found = velocity(variants, x, said, level, use)
                    errors[use].append(float((found - (noise - clean)).square().mean()))
            means = {use: round(float(np.mean(each)), 4) for use, each in errors.items()}
            rows.append({"open": left_open, "level": level, "with": means[True], "without": means[False]})
    return rows


def large_flops() -> dict[str, float]:
    """Saved against full attention by the paper's sizes beside Wan 2.1 1.3B at 480×832, by formula alone."""
    config, grid = PRESETS["wan2.1-1.3b"], LatentGrid.from_pixels(480, 832, 8)
    saved = {}
    for frames in (20, 40, 80):
        made = video_flops(config, PAPER_VIN, grid, frames, PAPER_CHUNKS, PAPER_STEPS)
        saved[str(frames)] = round(1 - made / (PAPER_STEPS * full_flops(config, grid, frames)), 3)
    return saved
