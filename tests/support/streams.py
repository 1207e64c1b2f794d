"""Streams as tests run them: with the context pass fused into the next denoise pass, or by itself."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import torch

from causalrope_sp import SequenceParallel, sample_chunks
from causalrope_sp.attention.base import Strategy
from causalrope_sp.attention.build import build_strategy
from causalrope_sp.grid import Shard
from causalrope_sp.planning.machines import default_machine
from causalrope_sp.planning.strategy import choose_strategy
from causalrope_sp.planning.workload import Workload
from causalrope_sp.sampling.chunk import LatentChunk
from causalrope_sp.sampling.chunk_loop import ChunkLoop
from causalrope_sp.sampling.stream_options import StreamOptions


def run_chunks(*args: Any, fuse_context_pass: bool = True, **options: Any) -> Generator[LatentChunk]:
    """`sample_chunks`; with `fuse_context_pass` False every context pass is a forward of its own."""
    return sample_chunks(*args, **options) if fuse_context_pass else _unfused(*args, **options)


@torch.inference_mode()
def _unfused(*args: Any, **options: Any) -> Generator[LatentChunk]:
    parallel = options.pop("parallel", None) or SequenceParallel.single()
    model, embeds, noise, grid, frames = args
    loop = ChunkLoop(model, embeds, noise, grid, frames, parallel, StreamOptions(**options))
    while loop.next_chunk is not None:
        loop.commit()
        yield loop.step()


def strategy_of(parallel: SequenceParallel, work: Workload) -> Strategy:
    """This rank's strategy for a stream of that size."""
    layout = choose_strategy(work, default_machine(parallel.device), parallel)
    return build_strategy(parallel, layout, work.grid, work.head_rings(layout.ulysses))


def global_indices(shard: Shard, frame: int) -> range:
    """g = t·S + a + j of a shard's tokens of the frame with global time index t."""
    base = frame * shard.grid.tokens
    return range(base + shard.start, base + shard.stop)
