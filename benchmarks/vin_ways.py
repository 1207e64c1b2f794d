"""The methods of sampling that `vin.py` compares: their videos, and their FLOPs by formula."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from causalrope_sp import CausalVideoPipeline, LatentGrid, SequenceParallel
from causalrope_sp.attention.build import build_strategy
from causalrope_sp.codec.pixels import to_uint8
from causalrope_sp.config import PRESETS, DiTConfig, StreamConfig
from causalrope_sp.diffusion.noise import keyed_generator, seeded_noise
from causalrope_sp.grid import split_into_chunks
from causalrope_sp.planning.cost import cross_flops
from causalrope_sp.planning.machines import default_machine
from causalrope_sp.planning.strategy import choose_strategy
from causalrope_sp.planning.workload import Workload
from causalrope_sp.toybox.prompts import SceneSpec
from causalrope_sp.toybox.scenes import PLACE_VARIABLES, render
from causalrope_sp.toybox.toybox_text import leave_open
from causalrope_sp.vin import PAPER_CHUNKS, PAPER_VIN, ParallelChunksConfig, sample_parallel_chunks
from causalrope_sp.vin.chunks import AssignedChunks, cut
from causalrope_sp.vin.fusion import join
from causalrope_sp.vin.parallel_forward import ParallelChunksForward
from causalrope_sp.vin.vin_cost import full_flops, parallel_chunks_flops

if TYPE_CHECKING:
    from causalrope_sp.pipeline.parallel_chunks import ParallelChunks

WAYS = ("VIN", "full attention", "autoregressive", "VIN without global tokens", "VIN without fusion")
TRUTH = "rendered, through the codec"
OPEN: dict[str, dict[str, bool]] = {"nothing": {}, "colours": {"colors": True}, "places": {"places": True}}
LEVELS = (0.99, 0.98, 0.95, 0.9, 0.8, 0.5)


class Ways:
    """The models, loaded once, and the videos of each method."""

    def __init__(self) -> None:
        self.vin = CausalVideoPipeline.from_pretrained("toybox-vin", parallel_chunks="vin")
        self.flow = CausalVideoPipeline.from_pretrained("toybox-flow")
        assert self.vin.together is not None, "the pipeline was loaded with parallel_chunks='vin'"
        self.parallel_chunks: ParallelChunks = self.vin.together

    def video(self, method: str, scene: SceneSpec, frames: int, seed: int, left_open: str = "nothing") -> np.ndarray:
        """Generates a video by a method, uint8 (T, H, W, 3), from a text that leaves something open, see `OPEN`."""
        if method == TRUTH:
            return self._rendered(scene, frames, seed)
        if method == "autoregressive":
            video = self.flow(scene.prompt(), frames=frames, seed=seed)
            assert video is not None, "this benchmark runs on one rank"
            return video
        pipe, count = self.vin, latent_frames(frames)
        channels = pipe.model.config.in_channels
        opening = pipe.text.opening(channels, pipe.grid.latent_height, pipe.grid.latent_width)
        vin, chunks = settings(method, self.parallel_chunks, count)
        embeds = leave_open(pipe.text.encode(scene.prompt(), seed), **OPEN[left_open])
        noise = seeded_noise(seed, (1, channels, pipe.grid.latent_height, pipe.grid.latent_width))
        for output in sample_parallel_chunks(
            pipe.model,
            vin,
            embeds,
            noise,
            pipe.grid,
            count,
            chunks=chunks,
            sampler=pipe.model_config.sampler,
            initial_latents=opening,
        ):
            latents = output.latents
        assert latents is not None, "the last step returns the video"
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
        """Encodes the rendered scene, with the start positions that the seed draws for the text."""
        positions = torch.rand(1, PLACE_VARIABLES, generator=keyed_generator(seed))
        whole = 4 * (latent_frames(frames) - 1) + 1
        pixels = render([scene], positions, torch.arange(whole), self.vin.height).transpose(1, 2) * 2 - 1
        return self.vin.codec.encoder().encode(pixels)

    def seams(self, frames: int) -> list[int]:
        """Returns the first pixel frame that each chunk owns, for all chunks but the first."""
        chunks = cut(latent_frames(frames), self.parallel_chunks.chunks)
        own = [
            AssignedChunks(chunks, self.parallel_chunks.chunks, n, len(chunks)).owned.start
            for n in range(1, len(chunks))
        ]
        return [1 + 4 * (frame - 1) for frame in own]


def latent_frames(frames: int) -> int:
    return 1 - (1 - frames) // 4


def settings(method: str, parallel_chunks: ParallelChunks, frames: int) -> tuple[Any, ParallelChunksConfig]:
    """Returns the network, or None, and the chunks of a method that denoises all chunks in parallel."""
    if method == "full attention":
        return None, replace(parallel_chunks.chunks, chunk_frames=frames)
    if method == "VIN without global tokens":
        return None, parallel_chunks.chunks
    if method == "VIN without fusion":
        return parallel_chunks.vin, replace(parallel_chunks.chunks, fuse_above=1.0)
    return parallel_chunks.vin, parallel_chunks.chunks


def autoregressive_flops(config: DiTConfig, grid: LatentGrid, stream: StreamConfig, frames: int, steps: int) -> int:
    """Counts the FLOPs of every chunk's denoise passes and of its context pass, which the last chunk does not have."""
    work = Workload(config, grid, stream.window or frames, stream.chunk_frames, steps)
    total, chunks = 0, list(split_into_chunks(frames, stream.chunk_frames, start=1))
    for chunk in chunks:
        tokens, keys = chunk.frames * grid.tokens, min(chunk.stop, work.window) * grid.tokens
        attention = 4 * config.num_layers * tokens * keys * config.dim
        embedding = 2 * chunk.frames * config.dim * (config.freq_dim + 7 * config.dim)
        passes = steps if chunk == chunks[-1] else steps + 1
        total += passes * (work.linear_flops * tokens + cross_flops(work, tokens) + attention + embedding)
    return total


def flops_of(method: str, ways: Ways, frames: int) -> int:
    """Counts the FLOPs of a whole video by a method."""
    config, grid, count = ways.vin.model.config, ways.vin.grid, latent_frames(frames)
    steps = len(ways.vin.model_config.sampler.steps)
    if method == "autoregressive":
        model_config = ways.flow.model_config
        return autoregressive_flops(config, grid, model_config.stream, count, len(model_config.sampler.steps))
    if method == "full attention":
        return steps * full_flops(config, grid, count, initial_frames=1)
    vin, chunks = settings(method, ways.parallel_chunks, count)
    return steps * parallel_chunks_flops(config, vin and vin.config, grid, count, chunks, initial_frames=1)


@torch.inference_mode()
def held_out(ways: Ways, scenes: list[SceneSpec], frames: int) -> list[dict[str, Any]]:
    """Measures the mean squared error of the velocity on rendered scenes at several noise levels, with and without
    global tokens."""
    pipe, rows, count = ways.vin, [], latent_frames(frames)
    parallel, assigned = (
        SequenceParallel.single(device="cpu"),
        AssignedChunks(cut(count, ways.parallel_chunks.chunks, 1), ways.parallel_chunks.chunks),
    )
    work = Workload(pipe.model.config, pipe.grid, ways.parallel_chunks.chunks.chunk_frames + 1, 1, 1)
    cases = []
    for seed, scene in enumerate(scenes):
        clean = ways.latents(scene, frames, seed)
        noise = torch.randn(clean.shape, generator=keyed_generator(seed, 1))
        cases.append((clean, noise, pipe.text.encode(scene.prompt(), seed)))
    for left_open, what in OPEN.items():
        for level in LEVELS:
            errors: dict[bool, list[float]] = {True: [], False: []}
            for clean, noise, embeds in cases:
                x = pipe.grid.patchify((1 - level) * clean + level * noise)
                for use in (True, False):
                    vin, text = ways.parallel_chunks.vin if use else None, leave_open(embeds, **what)
                    layout = choose_strategy(work, default_machine(parallel.device), parallel)
                    strategy = build_strategy(parallel, layout, pipe.grid, pipe.model.config.num_heads)
                    state = ParallelChunksForward(pipe.model, vin, text, pipe.grid, assigned, 1, strategy, parallel)
                    state.commit(pipe.grid.patchify(pipe.text.opening(*clean.shape[2:])))
                    found = join(state.velocities(x, 1000 * level), ways.parallel_chunks.chunks.overlap, fused=False)
                    errors[use].append(float((found - pipe.grid.patchify(noise - clean)).square().mean()))
            means = {use: round(float(np.mean(each)), 4) for use, each in errors.items()}
            rows.append({"open": left_open, "level": level, "with": means[True], "without": means[False]})
    return rows


def large_flops() -> dict[str, float]:
    """Computes the share of FLOPs that the paper's sizes save with Wan 2.1 1.3B at 480×832, compared with full
    attention, by the number of latent frames."""
    config, grid = PRESETS["wan2.1-1.3b"], LatentGrid.from_pixels(480, 832, 8)
    saved = {}
    for frames in (20, 40, 80):
        of_full = parallel_chunks_flops(config, PAPER_VIN, grid, frames, PAPER_CHUNKS) / full_flops(
            config, grid, frames
        )
        saved[str(frames)] = round(1 - of_full, 3)
    return saved
