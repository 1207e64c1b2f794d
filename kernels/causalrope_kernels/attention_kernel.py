"""The Triton kernel of flash attention (arXiv 2307.08691) over ranges of a ring of keys, with its log-sum-exp.

The kernel reads the bounds of the ranges on the device, so that one captured graph serves a window that fills and one
that is full. Rotation on read (the `relative` policy) is applied to the queries instead of the keys: a rotation may
move to the other side of a product, and all keys of a slot share one rotation, so the kernel rotates the queries back,
once per slot. The rotated queries are rounded once more, which makes the error of the log-sum-exp up to five times
that of rotated keys (1e-4 in bfloat16, which a merge does not notice); the error of the output hardly grows.

The kernel computes 4·T·L·H·d FLOPs. Shapes: B batch, T queries, L keys, H heads, d head width, N ranges.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from causalrope_kernels.arguments import Keys, RotateOnRead
from causalrope_kernels.launch import Kernel, blocks_of, padded
from causalrope_kernels.quantized_attention import by_blocks
from causalrope_kernels.quantized_heads_kernel import load_scales, widened
from causalrope_kernels.reference import Partial, rotated
from causalrope_kernels.tables import is_aligned

LOG2_E = 1.4426950408889634
PROCESSORS = 132  # multiprocessors of an H100 or H200
MOST_SHARES = 8
SMALL = (86, 89, 120, 121)  # compute capabilities whose blocks have 99 KiB of shared memory, not 163 or 227
LN_2 = tl.constexpr(0.6931471805599453)


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


@triton.jit
def _load(x, offsets, valid, FIRST: tl.constexpr, COUNT: tl.constexpr, WIDTH: tl.constexpr, MASKED: tl.constexpr):
    """Loads channels [FIRST, FIRST + COUNT) of the rows that begin at `offsets`.

    Channels beyond WIDTH and, if MASKED, rows that are not `valid` read as zeros.
    """
    channel = FIRST + tl.arange(0, COUNT)
    offset = offsets[:, None] + channel[None, :]
    if MASKED:
        return tl.load(x + offset, mask=valid[:, None] & (channel < WIDTH)[None, :], other=0.0)
    elif FIRST + COUNT > WIDTH:
        return tl.load(x + offset, mask=(channel < WIDTH)[None, :], other=0.0)
    else:
        return tl.load(x + offset)


@triton.jit
def _block(
    total, weights, largest, query, rest, q, q_offsets, q_valid, k, v, k_scales, v_scales, begin, stop, k_row, v_row,
    scale, KEYS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, SLICE: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """Attends one block of keys. Only the last block of a range, the TAIL, may hold fewer than KEYS keys.

    The scale of a quantized key is a factor of its scores, and that of a quantized value a factor of its weights.
    """
    dtype: tl.constexpr = q.dtype.element_ty
    row = tl.arange(0, KEYS)
    valid = begin + row < stop
    k_block, v_block = k + tl.cast(begin, tl.int64) * k_row, v + tl.cast(begin, tl.int64) * v_row
    if query.shape[1] * 2 == BLOCK:
        key = widened(_load(k_block, row * k_row, valid, 0, BLOCK // 2, WIDTH, TAIL), dtype)
        scores = tl.dot(query, tl.trans(key), input_precision="ieee")
        key = widened(_load(k_block, row * k_row, valid, BLOCK // 2, BLOCK // 2, WIDTH, TAIL), dtype)
        scores = tl.dot(rest, tl.trans(key), scores, input_precision="ieee")
    elif SLICE == BLOCK:
        key = widened(_load(k_block, row * k_row, valid, 0, BLOCK, WIDTH, TAIL), dtype)
        scores = tl.dot(query, tl.trans(key), input_precision="ieee")
    else:
        scores = tl.zeros([q_valid.shape[0], KEYS], tl.float32)
        for first in tl.static_range(0, BLOCK, SLICE):
            part = _load(q, q_offsets, q_valid, first, SLICE, WIDTH, True)
            key = widened(_load(k_block, row * k_row, valid, first, SLICE, WIDTH, TAIL), dtype)
            scores = tl.dot(part, tl.trans(key), scores, input_precision="ieee")
    scores *= scale
    if k_scales is not None:
        scores *= load_scales(k_scales, begin, row, k_row // WIDTH, valid, k, TAIL)[None, :]
    if TAIL:
        scores = tl.where(valid[None, :], scores, float("-inf"))
    new = tl.maximum(largest, tl.max(scores, 1))
    safe = tl.where(new == float("-inf"), 0.0, new)  # all scores of a block may be minus infinity
    shrink = tl.exp2(largest - safe)
    weight = tl.exp2(scores - safe[:, None])
    weights = weights * shrink + tl.sum(weight, 1)
    if v_scales is not None:
        weight *= load_scales(v_scales, begin, row, v_row // WIDTH, valid, v, TAIL)[None, :]
    value = widened(_load(v_block, row * v_row, valid, 0, BLOCK, WIDTH, TAIL), dtype)
    total = tl.dot(weight.to(dtype), value, total * shrink[:, None], input_precision="ieee")
    return total, weights, new


@triton.jit
def _contiguous(
    total, weights, largest, query, rest, q, q_offsets, q_valid, k, v, k_scales, v_scales, first, stop, k_row, v_row,
    scale, KEYS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, SLICE: tl.constexpr,
):  # fmt: skip
    """Attends the contiguous keys [first, stop), block by block."""
    whole = first + (stop - first) // KEYS * KEYS
    for begin in tl.range(first, whole, KEYS):
        total, weights, largest = _block(
            total, weights, largest, query, rest, q, q_offsets, q_valid, k, v, k_scales, v_scales, begin, stop, k_row,
            v_row, scale, KEYS, WIDTH, BLOCK, SLICE, TAIL=False,
        )  # fmt: skip
    if whole < stop:
        total, weights, largest = _block(
            total, weights, largest, query, rest, q, q_offsets, q_valid, k, v, k_scales, v_scales, whole, stop, k_row,
            v_row, scale, KEYS, WIDTH, BLOCK, SLICE, TAIL=True,
        )  # fmt: skip
    return total, weights, largest


@triton.jit(do_not_specialize=["queries", "heads", "slot_tokens"])
def attention_kernel(
    q, k, v, out, lse, bounds, rotate_on_read, k_scales, v_scales,
    queries, heads, slot_tokens, scale,
    q_batch, q_token, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head,
    RANGES: tl.constexpr, SHARES: tl.constexpr, ON_READ_PAIRS: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, SLICE: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Program (i, b·H + h, n) attends the i-th block of queries of head h on the n-th share of every range.

    `scale` is log2(e)/√d, so that scores are exponents of two.
    """
    batch, head = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    token = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    q_valid = token < queries
    q += batch * q_batch + head * q_head
    k += batch * k_batch + head * k_head
    v += batch * v_batch + head * v_head
    if k_scales is not None:
        k_scales += batch * (k_batch // WIDTH) + head * (k_head // WIDTH)
        v_scales += batch * (v_batch // WIDTH) + head * (v_head // WIDTH)
    q_offsets = token.to(tl.int64) * q_token
    channel = tl.arange(0, BLOCK)
    mask = q_valid[:, None] & (channel < WIDTH)[None, :]
    HALF: tl.constexpr = BLOCK // 2

    total = tl.zeros([QUERIES, BLOCK], tl.float32)
    weights = tl.zeros([QUERIES], tl.float32)
    largest = tl.full([QUERIES], float("-inf"), tl.float32)
    for number in tl.static_range(RANGES):
        first, stop = tl.load(bounds + 2 * number), tl.load(bounds + 2 * number + 1)
        unit = slot_tokens if ON_READ_PAIRS else KEYS
        units = tl.cdiv(stop - first, unit)
        share = tl.program_id(2)
        stop = tl.minimum(stop, first + units * (share + 1) // SHARES * unit)
        first += units * share // SHARES * unit
        if ON_READ_PAIRS:
            # time rotates channels of the first half alone; the other half is the same for all slots
            pair = tl.arange(0, HALF // 2)
            rest = _load(q, q_offsets, q_valid, HALF, HALF, WIDTH, True)
            for slot in tl.range(first // slot_tokens, stop // slot_tokens, num_stages=1):
                plain = _load(q, q_offsets, q_valid, 0, HALF, WIDTH, True).to(tl.float32)
                even, odd = tl.split(tl.reshape(plain, [QUERIES, HALF // 2, 2]))
                angle = rotate_on_read + slot * 2 * ON_READ_PAIRS + pair
                cos = tl.load(angle, mask=pair < ON_READ_PAIRS, other=1.0).to(tl.float32)[None, :]
                sin = tl.load(angle + ON_READ_PAIRS, mask=pair < ON_READ_PAIRS, other=0.0).to(tl.float32)[None, :]
                back = tl.reshape(tl.join(even * cos + odd * sin, odd * cos - even * sin), [QUERIES, HALF])
                total, weights, largest = _contiguous(
                    total, weights, largest, back.to(q.dtype.element_ty), rest, q, q_offsets, q_valid, k, v,
                    k_scales, v_scales, slot * slot_tokens, (slot + 1) * slot_tokens, k_row, v_row, scale,
                    KEYS, WIDTH, BLOCK, SLICE,
                )  # fmt: skip
        else:
            query = _load(q, q_offsets, q_valid, 0, BLOCK, WIDTH, True)
            total, weights, largest = _contiguous(
                total, weights, largest, query, query, q, q_offsets, q_valid, k, v, k_scales, v_scales, first, stop,
                k_row, v_row, scale, KEYS, WIDTH, BLOCK, SLICE,
            )  # fmt: skip

    empty = weights == 0.0
    divisor = tl.where(empty, 1.0, weights)
    row = ((tl.program_id(2) * (tl.num_programs(1) // heads) + batch) * queries + token) * heads + head
    result = (total / divisor[:, None]).to(out.dtype.element_ty)
    tl.store(out + row[:, None] * WIDTH + channel[None, :], result, mask=mask)
    tl.store(lse + row, tl.where(empty, float("-inf"), (largest + tl.log2(divisor)) * LN_2), mask=q_valid)


KERNEL = Kernel(attention_kernel)


@cache
def tile(queries: int, width: int, dtype: torch.dtype, rotated: bool, architecture: int) -> Tile:
    """Returns the launch parameters for T `queries` of head width `width`.

    A larger block of queries reads the keys less often, and needs more registers for the sum over d. These blocks are
    the largest that compile without a register spill (benchmarks/compiled_kernels.md).

    Args:
        queries: T.
        width: d.
        dtype: of queries, keys and values.
        rotated: whether keys are rotated on read.
        architecture: the compute capability as one number, such as 90.
    """
    if dtype == torch.float32:
        return Tile(32, 16, 4, 1, 16) if width <= 128 else Tile(16 if architecture in SMALL else 32, 16, 8, 1, 16)
    if width > 128:
        return Tile(32, 32, 8, 2)
    if architecture in SMALL and width > 64:
        return Tile(64, 32, 8, 2)
    if rotated and width > 64 and architecture < 90:
        return Tile(64, 32, 8, 3)
    if queries <= 64 or (rotated and width > 64 and architecture >= 100):
        return Tile(64, 64, 8, 2)
    return Tile(128, 64, 8, 3) if width > 64 or rotated else Tile(128, 128, 8, 3)


@cache
def quantized_tile(queries: int, width: int, dtype: torch.dtype, rotated: bool, architecture: int) -> Tile:
    """Returns the launch parameters for keys in 8 bits, whose conversion takes registers; see `tile`."""
    if dtype == torch.float32:
        return Tile(32, 16, 8, 1, 16) if width <= 128 and architecture not in SMALL else Tile(16, 16, 8, 1, 16)
    if width > 128:
        return Tile(16, 32, 8, 2)
    if rotated:
        return Tile(64, 32, 8, 3)
    whole_keys = width <= 64 or 90 <= architecture < 120  # earlier and small GPUs hold a block of keys in registers
    if queries <= 64:
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
    key = q_BTHD.shape, q_BTHD.stride(), is_aligned(q_BTHD), reuse_q, keys.layout
    plan = PLANS.get(key)
    if plan is None:
        plan = PLANS[key] = _plan(q_BTHD, keys, reuse_q)
    out = q_BTHD if plan.overwrites else q_BTHD.new_empty(plan.out_shape)
    lse = torch.empty(plan.out_shape[:-1], dtype=torch.float32, device=q_BTHD.device)
    table = None if rotate_on_read is None else rotate_on_read.table
    tensors = q_BTHD, *keys.bits, out, lse, keys.bounds, table, keys.k_scales, keys.v_scales
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
        launch: launches it again, once it was launched.
    """

    grid: tuple[int, int, int]
    numbers: tuple[float, ...]
    constants: tuple[int, ...]
    options: dict[str, int]
    out_shape: tuple[int, ...]
    overwrites: bool
    launch: Callable[..., None] | None = None


PLANS: dict[tuple[object, ...], _Plan] = {}


def _plan(q_BTHD: Tensor, keys: Keys, reuse_q: bool) -> _Plan:
    batch, queries, heads, width = q_BTHD.shape
    rotate_on_read = keys.rotate_on_read
    tokens, pairs = (1, 0) if rotate_on_read is None else (rotate_on_read.tokens, rotate_on_read.table.shape[2])
    block = max(16 if rotate_on_read is None else 32, padded(width))
    size_of = tile if keys.k_scales is None else quantized_tile
    size = size_of(queries, width, q_BTHD.dtype, rotate_on_read is not None, architecture(q_BTHD.device))
    blocks = blocks_of(queries, size.queries)
    count = shares(blocks * batch * heads, keys.k.shape[1], q_BTHD.device)
    strides = *q_BTHD.stride()[:3], *keys.k.stride()[:3], *keys.v.stride()[:3]
    channels = min(size.channels or block, block)
    return _Plan(
        (blocks, batch * heads, count),
        (queries, heads, tokens, width**-0.5 * LOG2_E, *strides),
        (keys.bounds.shape[0], count, pairs, width, block, channels, size.queries, size.keys),
        {"num_warps": size.warps, "num_stages": size.stages},
        (batch, queries, heads, width) if count == 1 else (count, batch, queries, heads, width),
        reuse_q and count == 1 and q_BTHD.is_contiguous(),
    )
