"""Tests whether global tokens make distant chunks agree, on the smallest video that shows it: one token a frame, the
same in all frames.

    python benchmarks/vin_agreement.py

Each video is one of 256 patterns of signs, noised; the text does not say which. A chunk has three frames and shares one
with the next, so that without global tokens it depends on three noisy frames, and with them on all frames. A tiny DiT
and its VIN are trained from random weights with the loss of train_vin.py, in half a minute; a quarter of the steps
train without global tokens, so that the DiT has been trained for the ablation too. The script prints how often the
first and the last chunk agree in a sign, then JSON.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click
import torch
from printed import finish, print_table
from torch import Tensor, nn

from causalrope_sp import CausalDiT, DiTConfig, LatentGrid, SamplerConfig, SequenceParallel
from causalrope_sp.diffusion.noise import seeded_noise
from causalrope_sp.toybox.chart import chart
from causalrope_sp.vin import ParallelChunksConfig, VideoInterfaceNetwork, VINConfig, sample_parallel_chunks

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from vin_training.forward import Pair, ParallelChunksForcing, VideoBatch

DIT = DiTConfig(dim=48, ffn_dim=96, num_heads=4, num_layers=2, text_dim=4, text_len=1, freq_dim=16, in_channels=2)
VIN = VINConfig(global_tokens=4, dim=48, heads=4, layers=2, position_layers=1)
CHUNKS = ParallelChunksConfig(chunk_frames=3, overlap=1, keyframe_every=1)
GRID = LatentGrid(1, 1)
FRAMES, SIZE = 17, 0.6  # latent frames of a video, in eight chunks; the size of its numbers relative to the noise
SAMPLER = SamplerConfig(tuple(1000 - 40 * n for n in range(25)), shift=2.0, solver="euler")


def videos(count: int, generator: torch.Generator) -> Tensor:
    signs = torch.randint(0, 2, (count, 1, DIT.in_channels, 2, 2), generator=generator) * 2 - 1
    return (SIZE * signs).expand(-1, FRAMES, -1, -1, -1)


def train(steps: int, batch: int = 128) -> Pair:
    torch.manual_seed(0)
    pair = Pair(CausalDiT(DIT), VideoInterfaceNetwork(VIN, DIT))
    forcing = ParallelChunksForcing(GRID, CHUNKS, pair, torch.device("cpu"))
    optimizer = torch.optim.AdamW(pair.parameters(), 3e-3, weight_decay=0)
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        clean = videos(batch, generator)
        levels = 0.3 + 0.7 * torch.rand(batch, generator=generator)
        data = VideoBatch(
            clean, torch.ones(clean.shape[:2] + clean.shape[3:]), torch.zeros(batch, 1, DIT.text_dim), levels, levels
        )
        chunk = forcing.chunk(FRAMES, generator)
        errors = forcing.errors(pair, data, chunk, generator, use_z=step % 4 != 3).everywhere
        optimizer.zero_grad()
        errors.mean().backward()
        nn.utils.clip_grad_norm_(pair.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1, (step + 1) / 50) * min(1, 2 * (1 - step / steps) + 0.02)
        optimizer.step()
    return pair.eval().requires_grad_(False)


def agreement(pair: Pair, use_vin: bool, chunks: ParallelChunksConfig = CHUNKS, count: int = 64) -> dict[str, float]:
    """Samples videos and compares signs; by chance, half of them agree.

    Returns:
        far: the share of signs in which the first and the last frame agree.
        seams: the share of signs in which the frames on the two sides of a seam agree, as the mean over seams.
        size: the mean size of the numbers, relative to that of the training videos.
    """
    frame = (DIT.in_channels, GRID.latent_height, GRID.latent_width)
    for output in sample_parallel_chunks(
        pair.dit,
        pair.vin if use_vin else None,
        torch.zeros(count, 1, DIT.text_dim),
        seeded_noise(1, (count, *frame)),
        GRID,
        FRAMES,
        chunks=chunks,
        sampler=SAMPLER,
        parallel=SequenceParallel.single(device="cpu"),
        initial_latents=chart(count, *frame),
    ):
        latents = output.latents
    assert latents is not None, "the last step returns the video"
    signs = latents > 0
    seams = range(chunks.chunk_frames, FRAMES, chunks.chunk_frames - chunks.overlap)
    at_seams = [float((signs[:, s] == signs[:, s - 1]).float().mean()) for s in seams]
    return {
        "far": float((signs[:, 0] == signs[:, -1]).float().mean()),
        "seams": sum(at_seams) / len(at_seams),
        "size": float(latents.abs().mean()) / SIZE,
    }


@click.command()
@click.option("--steps", default=600, show_default=True)
def main(steps: int) -> None:
    torch.set_num_threads(1)
    pair = train(steps)
    unfused = ParallelChunksConfig(CHUNKS.chunk_frames, CHUNKS.overlap, CHUNKS.keyframe_every, fuse_above=1.0)
    variants: dict[str, Any] = {
        "VIN": agreement(pair, True),
        "VIN without global tokens": agreement(pair, False),
        "VIN without fusion": agreement(pair, True, unfused),
        "neither": agreement(pair, False, unfused),
    }
    lines = [(name, *(f"{found[key]:.3f}" for key in ("far", "seams", "size"))) for name, found in variants.items()]
    print_table(("variant", "first and last chunk agree", "frames at seams agree", "size of the numbers"), lines)
    finish("vin_agreement", steps=steps, variants=variants)


if __name__ == "__main__":
    main()
