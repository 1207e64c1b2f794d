"""The FLOPs of a step of parallel chunks, from sizes alone, and those of full attention for comparison. Tests hold them
to torch's FLOP counter.

Shapes: S tokens of a frame, G global tokens, K keyframes, L text tokens, D model width, d VIN width.
"""

from __future__ import annotations

from causalrope_sp.config import DiTConfig
from causalrope_sp.grid import LatentGrid
from causalrope_sp.planning.counts import cross_flops
from causalrope_sp.planning.workload import Workload
from causalrope_sp.vin.chunks import AssignedChunks, cut
from causalrope_sp.vin.vin_config import ParallelChunksConfig, VINConfig


def full_flops(config: DiTConfig, grid: LatentGrid, frames: int, initial_frames: int = 0) -> int:
    """Counts the FLOPs of a step in which every frame attends every frame.

    Args:
        config: sizes of the DiT.
        grid: the latent frame in tokens.
        frames: latent frames of the video.
        initial_frames: latent frames before the video whose keys are cached.
    """
    return _dit_flops(config, grid, frames, frames * (initial_frames + frames) * grid.tokens**2)


def parallel_chunks_flops(
    config: DiTConfig,
    vin: VINConfig | None,
    grid: LatentGrid,
    frames: int,
    chunks: ParallelChunksConfig,
    initial_frames: int = 0,
) -> int:
    """Counts the FLOPs of a step on one rank: the DiT over all chunks, a shared frame twice, and the VIN once.

    Of several ranks each processes the global tokens, which saves a collective.

    Args:
        config: sizes of the DiT.
        vin: sizes of the VIN; None for a step without global tokens.
        grid: the latent frame in tokens.
        frames: latent frames of the video.
        chunks: how the video is cut.
        initial_frames: latent frames before the video whose keys are cached.
    """
    cuts, tokens = cut(frames, chunks), grid.tokens
    global_tokens = 0 if vin is None else vin.global_tokens
    pairs = sum(c.frames * tokens * (global_tokens + (initial_frames + c.frames) * tokens) for c in cuts)
    flops = _dit_flops(config, grid, sum(c.frames for c in cuts), pairs)
    return flops if vin is None else flops + vin_flops(config, vin, grid, _keyframes(frames, chunks))


def video_flops(
    config: DiTConfig,
    vin: VINConfig | None,
    grid: LatentGrid,
    frames: int,
    chunks: ParallelChunksConfig,
    steps: int,
    initial_frames: int = 0,
    guided_steps: int = 0,
) -> int:
    """Counts the FLOPs of a video of so many steps, of which `guided_steps` are guided by the global tokens; see
    `parallel_chunks_flops` for the other arguments."""
    once = 0 if vin is None else vin_flops_once(config, vin, grid, _keyframes(frames, chunks))
    conditional = steps * parallel_chunks_flops(config, vin, grid, frames, chunks, initial_frames)
    unconditional = 0 if vin is None else parallel_chunks_flops(config, None, grid, frames, chunks, initial_frames)
    return once + conditional + guided_steps * unconditional


def vin_flops(config: DiTConfig, vin: VINConfig, grid: LatentGrid, keyframes: int) -> int:
    """Counts the FLOPs of the VIN in a step: the read, the blocks, and the keys and values for the DiT's layers.

    Args:
        config: sizes of the DiT.
        vin: sizes of the VIN.
        grid: the latent frame in tokens.
        keyframes: the keyframes of the video, K.
    """
    dim, queries, text, frequencies = vin.dim, vin.global_tokens, config.text_len, config.freq_dim
    keys = keyframes * grid.tokens
    time = frequencies * dim + dim * dim
    read = keys * (2 * config.token_dim + dim) * dim  # embedding, to keys; to values
    read += 2 * queries * dim * dim + 2 * queries * keys * dim  # queries and output; scores and sums
    block = (queries + text) * 12 * dim * dim + 2 * (queries + text) ** 2 * dim
    output = config.num_layers * queries * dim * 2 * config.dim
    return 2 * (time + read + (1 + vin.layers) * block + output)


def vin_flops_once(config: DiTConfig, vin: VINConfig, grid: LatentGrid, keyframes: int) -> int:
    """Counts the FLOPs of the VIN once a video: the embedded text, and the embedded positions, which attend it.

    Args:
        config: sizes of the DiT.
        vin: sizes of the VIN.
        grid: the latent frame in tokens.
        keyframes: the keyframes of the video, K.
    """
    dim, keys, text = vin.dim, keyframes * grid.tokens, config.text_len
    embedded = keys * (3 * (dim // 2) + 2 * (dim // 2) * dim + dim * dim) + text * (config.text_dim + dim) * dim
    layer = 2 * text * dim * dim + keys * (2 * text + 10 * dim) * dim  # keys and values; scores, sums and the rest
    return 2 * (embedded + vin.position_layers * layer)


def _keyframes(frames: int, chunks: ParallelChunksConfig) -> int:
    return len(AssignedChunks(cut(frames, chunks), chunks).keyframes)


def _dit_flops(config: DiTConfig, grid: LatentGrid, frames: int, pairs: int) -> int:
    """Counts the FLOPs of a pass over frames whose queries and keys make so many pairs; the keys of the text are
    cached."""
    work = Workload(config, grid, window=frames, chunk_frames=frames, steps=1)
    tokens = frames * grid.tokens
    time = 2 * frames * config.dim * (config.freq_dim + config.dim + 6 * config.dim)
    return work.linear_flops * tokens + cross_flops(work, tokens) + time + 4 * config.num_layers * pairs * config.dim
