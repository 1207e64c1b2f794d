"""A small DiT with its Video Interface Network, and videos that they make."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from causalrope_sp import CausalDiT, DiTConfig, LatentGrid, SamplerConfig, StreamConfig
from causalrope_sp.diffusion.noise import seeded_noise
from causalrope_sp.distributed import SequenceParallel
from causalrope_sp.vin import ParallelChunksConfig, StepOutput, VideoInterfaceNetwork, VINConfig, sample_parallel_chunks

CONFIG = DiTConfig(dim=36, ffn_dim=48, num_heads=6, num_layers=2, text_dim=8, text_len=3, freq_dim=16, in_channels=2)
VIN = VINConfig(global_tokens=5, dim=24, heads=3, layers=2, position_layers=2)
CHUNKS = ParallelChunksConfig(chunk_frames=5, overlap=2, keyframe_every=2, fuse_above=0.5)
GRID = LatentGrid(1, 7)
STEPS = SamplerConfig((1000, 750, 500, 250), shift=1.0, solver="euler")


def random(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def make_pair(dtype: torch.dtype = torch.float64) -> tuple[CausalDiT, VideoInterfaceNetwork]:
    torch.manual_seed(0)
    pair = CausalDiT(CONFIG), VideoInterfaceNetwork(VIN, CONFIG)
    for network in pair:
        network.eval().requires_grad_(False)
        for parameter in network.parameters():
            parameter.mul_(1.5)  # large enough that a token attended too much or too little shows
    return pair[0].to(dtype), pair[1].to(dtype)


def frame_shape(grid: LatentGrid) -> tuple[int, int, int]:
    return CONFIG.in_channels, grid.latent_height, grid.latent_width


@dataclass(frozen=True)
class Job:
    """One video. `solver` "renoise" draws fresh noise at every step, "euler" none."""

    frames: int
    batch: int = 1
    initial_frames: int = 1
    dtype: torch.dtype = torch.float64
    sampler: SamplerConfig = STEPS
    chunks: ParallelChunksConfig = CHUNKS
    use_vin: bool = True
    preview_every: int | None = None

    def outputs(self, parallel: SequenceParallel) -> list[StepOutput]:
        model, vin = make_pair(self.dtype)
        frame = frame_shape(GRID)
        steps = sample_parallel_chunks(
            model,
            vin if self.use_vin else None,
            random(self.batch, CONFIG.text_len, CONFIG.text_dim).to(self.dtype),
            seeded_noise(0, (self.batch, *frame)),
            GRID,
            self.frames,
            chunks=self.chunks,
            sampler=self.sampler,
            parallel=parallel,
            initial_latents=random(self.batch, self.initial_frames, *frame).to(self.dtype)
            if self.initial_frames
            else None,
            preview_every=self.preview_every,
        )
        return [replace(m, latents=None if m.latents is None else m.latents.clone()) for m in steps]

    def video(self, parallel: SequenceParallel) -> Tensor:
        latents = self.outputs(parallel)[-1].latents
        assert latents is not None
        return latents


def single(job: Job) -> Tensor:
    return job.video(SequenceParallel.single(device="cpu"))


def relative(result: Tensor, expected: Tensor) -> float:
    return ((result.double() - expected.double()).norm() / expected.double().norm()).item()


def work_of(model: CausalDiT) -> Any:
    from causalrope_sp.planning.workload import Workload

    return Workload.of(model.config, GRID, StreamConfig(chunk_frames=5), STEPS, 6)
