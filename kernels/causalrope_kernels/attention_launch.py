"""The host side of the attention kernel: tiles, warps and shares of the keys for a GPU, and the launch.

Shapes: B batch, T queries, L keys, H heads, d head width, N ranges.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from causalrope_kernels.arguments import Keys, RotateOnRead
from causalrope_kernels.attention_kernel import attention_kernel
from causalrope_kernels.launch import Kernel, blocks_of, padded
from causalrope_kernels.quantized_attention import by_blocks
from causalrope_kernels.reference import Partial, rotated
from causalrope_kernels.tables import is_aligned, on_device

LOG2_E = 1.4426950408889634
PROCESSORS = 132  # multiprocessors of an H100 or H200
MOST_SHARES = 8
SMALL = (86, 89, 120, 121)  # compute capabilities whose blocks have 99 KiB of shared memory, not 163 or 227
KERNEL = Kernel(attention_kernel)


@dataclass(frozen=True)
class Tile:
    """The launch parameters of the kernel.

    Args:
        queries: the queries that a program holds.
        keys: the keys of one block.
        warps: the warps of a program.
        stages: the blocks of keys that are loaded ahead.
        channels: the channels that one product q·kᵀ takes; None for all.
    """

    queries: int
    keys: int
    warps: int
    stages: int
    channels: int | None = None


@cache
def tile(queries: int, width: int, dtype: torch.dtype, rotated: bool, lists: bool, architecture: int) -> Tile:
    """Returns the launch parameters for T `queries` of head width `width`.

    A larger block of queries reads the keys less often, and needs more registers for the sum over d; lists of ranges,
    whose loop is not unrolled, and bands, with a loop over slots, need some more. These blocks are the largest that
    compile without a register spill (benchmarks/compiled_kernels.md).

    Args:
        queries: T.
        width: d.
        dtype: of queries, keys and values.
        rotated: whether keys are rotated on read.
        lists: whether every head has ranges of its own, or queries see bands of the rows.
        architecture: the compute capability as one number, such as 90.
    """
    if dtype == torch.float32:
        if width <= 128:
            return Tile(32, 16, 8 if lists else 4, 1, 16)
        return Tile(16 if architecture in SMALL else 32, 16, 8, 1, 16)
    if width > 128:
        return Tile(32, 32, 8, 2)
    if architecture in SMALL and width > 64:
        return Tile(64, 32, 4 if lists and not rotated else 8, 2)
    if rotated and width > 64 and architecture < 90:
        return Tile(64, 32, 8, 3)
    if rotated and width > 64 and (lists or architecture >= 100):
        return Tile(64, 64, 8, 2)
    if queries <= 64 or (lists and architecture >= 100):
        return Tile(64, 64, 8, 2)
    return Tile(128, 64, 8, 3) if width > 64 or rotated else Tile(128, 128, 8, 3)


@cache
def quantized_tile(queries: int, width: int, dtype: torch.dtype, rotated: bool, lists: bool, architecture: int) -> Tile:
    """Returns the launch parameters for keys in 8 bits, whose conversion takes registers; see `tile`."""
    if dtype == torch.float32:
        return Tile(32, 16, 8, 1, 16) if width <= 128 and architecture not in SMALL else Tile(16, 16, 8, 1, 16)
    if width > 128:
        return Tile(16, 32, 8, 2)
    if rotated or (lists and not 90 <= architecture < 120):
        return Tile(64, 32, 8, 3)
    whole_keys = width <= 64 or 90 <= architecture < 120  # earlier and small GPUs hold a block of keys in registers
    if queries <= 64 or (lists and architecture >= 100):
        return Tile(64, 64, 8, 2) if whole_keys else Tile(64, 32, 8, 2, 64)
    return Tile(128, 64 if whole_keys else 32, 8, 2)


@cache
def architecture(device: torch.device) -> int:
    """Returns the compute capability of a GPU as one number, such as 90 for an H200; 90 for a device without one."""
    major, minor = torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)
    return 10 * major + minor


@cache
def processors(device: torch.device) -> int:
    """Returns the number of multiprocessors of a GPU; that of an H200 for a device without any."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else PROCESSORS


@cache
def shares(programs: int, keys: int, device: torch.device) -> int:
    """Returns the number of shares that the keys are attended in.

    Shares let few queries keep a whole GPU busy, and let many queries leave less of it idle in the last wave. A share
    costs a merge, so it must save more than that, and it holds at least 1024 keys.

    Args:
        programs: the programs of one share.
        keys: L.
        device: where the kernel runs.
    """
    at_once = processors(device)

    def busy(count: int) -> float:
        return programs * count / (-(-programs * count // at_once) * at_once)

    most = max(1, min(MOST_SHARES, keys // 1024))
    return max(range(1, most + 1), key=lambda count: busy(count) - 0.02 * count)


def attend(q_BTHD: Tensor, keys: Keys, *, reuse_q: bool = False) -> list[Partial]:
    """Attends all ranges of the keys in one launch.

    Args:
        q_BTHD: the queries.
        keys: keys and values, and the ranges of rows that are attended.
        reuse_q: whether one share's output may overwrite the queries; a program reads its own before it writes.

    Returns:
        For every share of the keys the output, (B, T, H, d), and its log-sum-exp in float32, (B, T, H).
    """
    if q_BTHD.numel() == 0:
        return [(torch.empty_like(q_BTHD), q_BTHD.new_empty(q_BTHD.shape[:3], dtype=torch.float32))]
    rotate_on_read = keys.rotate_on_read
    if rotate_on_read is not None and not rotates(q_BTHD, rotate_on_read):
        if keys.k_scales is not None:
            return [by_blocks(q_BTHD, keys)]
        keys = replace(keys, k=rotated(keys.k, rotate_on_read), rotate_on_read=None)
        rotate_on_read = None
    key = q_BTHD.shape, q_BTHD.stride(), q_BTHD.dtype, is_aligned(q_BTHD), reuse_q, keys.layout
    plan = PLANS.get(key)
    if plan is None:
        plan = PLANS[key] = _plan(q_BTHD, keys, reuse_q)
    out = q_BTHD if plan.overwrites else q_BTHD.new_empty(plan.out_shape)
    lse = torch.empty(plan.out_shape[:-1], dtype=torch.float32, device=q_BTHD.device)
    table = None if rotate_on_read is None else rotate_on_read.table
    tensors = q_BTHD, *keys.bits, out, lse, keys.bounds, table, keys.k_scales, keys.v_scales, plan.tiles
    if plan.launch is None:
        plan.launch = KERNEL.prepared(plan.grid, tensors, plan.numbers, plan.constants, **plan.options)
    else:
        plan.launch(*tensors)
    return [(out, lse)] if plan.grid[2] == 1 else list(zip(out, lse, strict=True))


def rotates(q_BTHD: Tensor, rotate_on_read: RotateOnRead) -> bool:
    """Returns whether the kernel rotates queries: in float32 no registers are left to do so, and the channels that
    rotate in time must be half of a head's at most."""
    return q_BTHD.dtype != torch.float32 and 4 * rotate_on_read.table.shape[2] <= max(32, padded(q_BTHD.shape[3]))


@dataclass
class _Plan:
    """How queries and keys of a layout are attended.

    Args:
        grid: the programs of the kernel; the last number is that of the shares.
        numbers: its numbers.
        constants: its constants.
        options: its warps and stages.
        out_shape: the shape of the outputs.
        overwrites: whether the output overwrites the queries.
        tiles: what each program of the first axis attends, where there are bands (see `Bands.tiles`).
        launch: launches it again, once it was launched.
    """

    grid: tuple[int, int, int]
    numbers: tuple[float, ...]
    constants: tuple[int, ...]
    options: dict[str, int]
    out_shape: tuple[int, ...]
    overwrites: bool
    tiles: Tensor | None
    launch: Callable[..., None] | None = None


PLANS: dict[tuple[object, ...], _Plan] = {}


def _plan(q_BTHD: Tensor, keys: Keys, reuse_q: bool) -> _Plan:
    batch, queries, heads, width = q_BTHD.shape
    rotate_on_read, bands = keys.rotate_on_read, keys.bands
    tokens, pairs = (1, 0) if rotate_on_read is None else (rotate_on_read.tokens, rotate_on_read.table.shape[2])
    block = max(16 if rotate_on_read is None else 32, padded(width))
    size_of = tile if keys.k_scales is None else quantized_tile
    lists, ranges = keys.head_ranges is not None, keys.bounds.shape[-2]
    most, read, tiles = queries, keys.k.shape[1], None
    if bands is not None:
        tokens = bands.slot_tokens
        most, seen = (max(stop - first for first, stop in spans) for spans in (bands.queries, bands.keys))
        most, read = min(most, 64), read // tokens * seen  # larger blocks of queries would spill, or be half empty
    nested = lists or bands is not None
    size = size_of(most, width, q_BTHD.dtype, rotate_on_read is not None, nested, architecture(q_BTHD.device))
    blocks = blocks_of(queries, size.queries)
    if bands is not None:
        lines = bands.tiles(queries // bands.frame_queries, size.queries)
        blocks, tiles = len(lines), on_device(lines, q_BTHD.device, torch.int32)
    count = shares(blocks * batch * heads, read, q_BTHD.device)
    strides = *q_BTHD.stride()[:3], *keys.k.stride()[:3], *keys.v.stride()[:3]
    channels = min(size.channels or block, block)
    return _Plan(
        (blocks, batch * heads, count),
        (queries, heads, tokens, width**-0.5 * LOG2_E, *strides),
        (ranges, lists, bands is not None, count, pairs, width, block, channels, size.queries, size.keys),
        {"num_warps": size.warps, "num_stages": size.stages},
        (batch, queries, heads, width) if count == 1 else (count, batch, queries, heads, width),
        reuse_q and count == 1 and q_BTHD.is_contiguous(),
        tiles,
    )
