"""What chunks made together cost a step, from sizes alone: FLOPs of one video, against attention over the whole of it,
and what a rank receives of the read and of overlaps. Both are tested, against torch's own counter and against the
ledger of a run. (Not counted: the assigned's own strategy, and the latents that are gathered once at the end.)

Shapes: S tokens of a frame, G global tokens, K keyframes, L text tokens, D model width, d VIN width.
"""

from __future__ import annotations

from causalrope_sp.attention.base import lse_elements
from causalrope_sp.config import DiTConfig
from causalrope_sp.grid import LatentGrid
from causalrope_sp.planning.cost import cross_flops
from causalrope_sp.planning.workload import Workload
from causalrope_sp.vin.chunks import AssignedChunks, cut
from causalrope_sp.vin.vin_config import ParallelChunksConfig, VINConfig


def full_flops(config: DiTConfig, grid: LatentGrid, frames: int, given: int = 0) -> int:
    """FLOPs of a step with every frame attending every frame, and `given` frames whose keys are cached."""
    return _dit_flops(config, grid, frames, frames * (given + frames) * grid.tokens**2)


def parallel_chunks_flops(
    config: DiTConfig,
    vin: VINConfig | None,
    grid: LatentGrid,
    frames: int,
    chunks: ParallelChunksConfig,
    given: int = 0,
) -> int:
    """FLOPs of a step on one rank: the DiT over all chunks, what is in two of them counted twice, and the VIN once.
    (Of several ranks each processes the global tokens, which spares an exchange.)"""
    cuts, tokens = cut(frames, chunks), grid.tokens
    found = 0 if vin is None else vin.global_tokens
    pairs = sum(c.frames * tokens * (found + (given + c.frames) * tokens) for c in cuts)
    flops = _dit_flops(config, grid, sum(c.frames for c in cuts), pairs)
    return flops if vin is None else flops + vin_flops(config, vin, grid, len(AssignedChunks(cuts, chunks).keyframes))


def vin_flops(config: DiTConfig, vin: VINConfig, grid: LatentGrid, keyframes: int) -> int:
    """FLOPs of the read over so many keyframes, the blocks, and the keys and values for the DiT's layers."""
    dim, found, text, frequencies = vin.dim, vin.global_tokens, config.text_len, config.freq_dim
    seen = keyframes * grid.tokens
    time = frequencies * dim + dim * dim
    read = seen * (2 * config.token_dim + 3 * frequencies + dim) * dim  # embedded and placed, to keys; to values
    read += 2 * found * dim * dim + 2 * found * seen * dim  # queries and output; scores and sums
    block = (found + text) * 12 * dim * dim + 2 * (found + text) ** 2 * dim
    handed = config.num_layers * found * dim * 2 * config.dim
    return 2 * (time + read + text * config.text_dim * dim + vin.layers * block + handed)


def read_elements(vin: VINConfig, ranks: int, batch: int, itemsize: int) -> int:
    """Elements that a rank receives in a step's read: partial results of all other ranks, however long the video is."""
    return (ranks - 1) * batch * vin.global_tokens * (vin.dim + vin.heads * lse_elements(itemsize))


def overlap_elements(config: DiTConfig, assigned: AssignedChunks, tokens: int, batch: int, fused: bool) -> int:
    """Elements that a rank with `tokens` of a frame receives of frames shared with the lanes beside its own."""
    sides = assigned.has_before + (assigned.has_after and fused)
    return sides * batch * assigned.config.overlap * tokens * config.token_dim


def _dit_flops(config: DiTConfig, grid: LatentGrid, frames: int, pairs: int) -> int:
    """A pass over frames whose queries and keys make so many pairs; its text's keys are there already."""
    work = Workload(config, grid, window=frames, chunk_frames=frames, steps=1)
    tokens = frames * grid.tokens
    time = 2 * frames * config.dim * (config.freq_dim + config.dim + 6 * config.dim)
    return work.linear_flops * tokens + cross_flops(work, tokens) + time + 4 * config.num_layers * pairs * config.dim
