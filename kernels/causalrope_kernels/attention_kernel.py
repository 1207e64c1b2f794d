"""Flash attention (arXiv 2307.08691) of a pass' queries on keys in stretches of a ring, with its log-sum-exp.

Where the stretches begin and end is read on the device, so that a captured graph can serve a window that fills and one
that is full. Keys that are cached unturned in time (`relative` policy) are not turned as they are read: a rotation may
go to either side of a product, and all keys of a slot share theirs, so the queries are turned back, once a slot. Those
are rounded once more, alike for all keys of a slot: the log-sum-exp errs up to five times what turned keys cost it
(1e-4 in bfloat16, nothing to a merge), the output hardly more than with turned keys.
4·T·L·H·d FLOP. Shapes: B batch, T queries, L keys, H heads, d head width, N stretches.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from causalrope_kernels.arguments import Keys
from causalrope_kernels.reference import Partial, rotated
from causalrope_kernels.tables import launching_on, on_device

LOG2_E = 1.4426950408889634
PROCESSORS = 132
MOST_SHARES = 8
LN_2 = tl.constexpr(0.6931471805599453)


@dataclass(frozen=True)
class Tile:
    """Queries and keys that a program holds at a time, its warps, how many blocks of keys are on their way, and how
    many channels a product q·kᵀ takes at once (None: all)."""

    queries: int
    keys: int
    warps: int
    stages: int
    channels: int | None = None


@triton.jit
def _load(x, offsets, there, FIRST: tl.constexpr, COUNT: tl.constexpr, WIDTH: tl.constexpr, MASKED: tl.constexpr):
    """Channels [FIRST, FIRST + COUNT) of the rows that begin at `offsets`; zeros beyond WIDTH and, if MASKED, where no
    row is."""
    channel = FIRST + tl.arange(0, COUNT)
    offset = offsets[:, None] + channel[None, :]
    if MASKED:
        return tl.load(x + offset, mask=there[:, None] & (channel < WIDTH)[None, :], other=0.0)
    elif FIRST + COUNT > WIDTH:
        return tl.load(x + offset, mask=(channel < WIDTH)[None, :], other=0.0)
    else:
        return tl.load(x + offset)


@triton.jit
def _block(
    total, weights, largest, query, rest, q, q_offsets, asked, k, v, begin, stop, k_row, v_row, scale,
    KEYS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, SLICE: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """One block of keys and values; only the last of a stretch, the TAIL, may hold fewer than KEYS."""
    row = tl.arange(0, KEYS)
    there = begin + row < stop
    k_block, v_block = k + tl.cast(begin, tl.int64) * k_row, v + tl.cast(begin, tl.int64) * v_row
    if query.shape[1] * 2 == BLOCK:
        key = _load(k_block, row * k_row, there, 0, BLOCK // 2, WIDTH, TAIL)
        scores = tl.dot(query, tl.trans(key), input_precision="ieee")
        key = _load(k_block, row * k_row, there, BLOCK // 2, BLOCK // 2, WIDTH, TAIL)
        scores = tl.dot(rest, tl.trans(key), scores, input_precision="ieee")
    elif SLICE == BLOCK:
        key = _load(k_block, row * k_row, there, 0, BLOCK, WIDTH, TAIL)
        scores = tl.dot(query, tl.trans(key), input_precision="ieee")
    else:
        scores = tl.zeros([asked.shape[0], KEYS], tl.float32)
        for first in tl.static_range(0, BLOCK, SLICE):
            part = _load(q, q_offsets, asked, first, SLICE, WIDTH, True)
            key = _load(k_block, row * k_row, there, first, SLICE, WIDTH, TAIL)
            scores = tl.dot(part, tl.trans(key), scores, input_precision="ieee")
    scores *= scale
    if TAIL:
        scores = tl.where(there[None, :], scores, float("-inf"))
    new = tl.maximum(largest, tl.max(scores, 1))
    safe = tl.where(new == float("-inf"), 0.0, new)  # a block may hold nothing but scores of minus infinity
    shrink = tl.exp2(largest - safe)
    weight = tl.exp2(scores - safe[:, None])
    weights = weights * shrink + tl.sum(weight, 1)
    value = _load(v_block, row * v_row, there, 0, BLOCK, WIDTH, TAIL)
    total = tl.dot(weight.to(v.dtype.element_ty), value, total * shrink[:, None], input_precision="ieee")
    return total, weights, new


@triton.jit
def _contiguous(
    total, weights, largest, query, rest, q, q_offsets, asked, k, v, first, stop, k_row, v_row, scale,
    KEYS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, SLICE: tl.constexpr,
):  # fmt: skip
    whole = first + (stop - first) // KEYS * KEYS
    for begin in tl.range(first, whole, KEYS):
        total, weights, largest = _block(
            total, weights, largest, query, rest, q, q_offsets, asked, k, v, begin, stop, k_row, v_row, scale,
            KEYS, WIDTH, BLOCK, SLICE, TAIL=False,
        )  # fmt: skip
    if whole < stop:
        total, weights, largest = _block(
            total, weights, largest, query, rest, q, q_offsets, asked, k, v, whole, stop, k_row, v_row, scale,
            KEYS, WIDTH, BLOCK, SLICE, TAIL=True,
        )  # fmt: skip
    return total, weights, largest


@triton.jit(do_not_specialize=["queries", "heads", "slot_tokens"])
def attention_kernel(
    q, k, v, out, lse, bounds, rotate_on_read,
    queries, heads, slot_tokens, scale,
    q_batch, q_token, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head,
    RANGES: tl.constexpr, SHARES: tl.constexpr, ON_READ_PAIRS: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, SLICE: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Program (i, b·H + h, n): the i-th block of queries of head h, on the n-th share of every stretch.

    `scale` is log2(e)/√d, for scores in powers of two.
    """
    batch, head = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    token = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    asked = token < queries
    q += batch * q_batch + head * q_head
    k += batch * k_batch + head * k_head
    v += batch * v_batch + head * v_head
    q_offsets = token.to(tl.int64) * q_token
    channel = tl.arange(0, BLOCK)
    mask = asked[:, None] & (channel < WIDTH)[None, :]
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
            # time turns channels of the first half alone; the other half is the same for all slots
            pair = tl.arange(0, HALF // 2)
            rest = _load(q, q_offsets, asked, HALF, HALF, WIDTH, True)
            for slot in tl.range(first // slot_tokens, stop // slot_tokens, num_stages=1):
                plain = _load(q, q_offsets, asked, 0, HALF, WIDTH, True).to(tl.float32)
                even, odd = tl.split(tl.reshape(plain, [QUERIES, HALF // 2, 2]))
                angle = rotate_on_read + slot * 2 * ON_READ_PAIRS + pair
                cos = tl.load(angle, mask=pair < ON_READ_PAIRS, other=1.0).to(tl.float32)[None, :]
                sin = tl.load(angle + ON_READ_PAIRS, mask=pair < ON_READ_PAIRS, other=0.0).to(tl.float32)[None, :]
                back = tl.reshape(tl.join(even * cos + odd * sin, odd * cos - even * sin), [QUERIES, HALF])
                total, weights, largest = _contiguous(
                    total, weights, largest, back.to(q.dtype.element_ty), rest, q, q_offsets, asked, k, v,
                    slot * slot_tokens, (slot + 1) * slot_tokens, k_row, v_row, scale, KEYS, WIDTH, BLOCK, SLICE,
                )  # fmt: skip
        else:
            query = _load(q, q_offsets, asked, 0, BLOCK, WIDTH, True)
            total, weights, largest = _contiguous(
                total, weights, largest, query, query, q, q_offsets, asked, k, v, first, stop, k_row, v_row, scale,
                KEYS, WIDTH, BLOCK, SLICE,
            )  # fmt: skip

    empty = weights == 0.0
    divisor = tl.where(empty, 1.0, weights)
    row = ((tl.program_id(2) * (tl.num_programs(1) // heads) + batch) * queries + token) * heads + head
    result = (total / divisor[:, None]).to(out.dtype.element_ty)
    tl.store(out + row[:, None] * WIDTH + channel[None, :], result, mask=mask)
    tl.store(lse + row, tl.where(empty, float("-inf"), (largest + tl.log2(divisor)) * LN_2), mask=asked)


def tile(queries: int, width: int, dtype: torch.dtype, rotated: bool, architecture: int) -> Tile:
    """A larger block of queries reads the keys less often; the registers, which hold the sum over d, bound it.

    These are the largest that compile without a spill (benchmarks/compiled_kernels.md).
    """
    if dtype == torch.float32:
        return Tile(32, 16, 4, 1, 16) if width <= 128 else Tile(32, 16, 8, 1, 16)
    if width > 128:
        return Tile(32, 32, 8, 2)
    if rotated and width > 64 and architecture < 90:
        return Tile(64, 32, 8, 3)
    if queries <= 64 or (rotated and width > 64 and architecture >= 100):
        return Tile(64, 64, 8, 2)
    return Tile(128, 64, 8, 3) if width > 64 or rotated else Tile(128, 128, 8, 3)


@cache
def architecture(device: torch.device) -> int:
    """The compute capability as one number, 90 for an H200; that too where there is no GPU to ask."""
    major, minor = torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)
    return 10 * major + minor


@cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; an H200's where there is none to ask."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else PROCESSORS


def shares(programs: int, keys: int, device: torch.device) -> int:
    """In how many shares the keys are attended, so that few queries keep a whole GPU busy, and many do not leave most
    of it idle at their end. A share costs a merge, so it must pay for it, and holds a thousand keys at least."""
    at_once = processors(device)

    def busy(count: int) -> float:
        return programs * count / (-(-programs * count // at_once) * at_once)

    most = max(1, min(MOST_SHARES, keys // 1024))
    return max(range(1, most + 1), key=lambda count: busy(count) - 0.02 * count)


def attend(q_BTHD: Tensor, keys: Keys) -> list[Partial]:
    """The attention over all stretches in one launch: (B, T, H, d) with the log-sum-exp in float32, (B, T, H), for each
    of some shares of the keys."""
    batch, queries, heads, width = q_BTHD.shape
    if q_BTHD.numel() == 0:
        return [(torch.empty_like(q_BTHD), q_BTHD.new_empty(batch, queries, heads, dtype=torch.float32))]
    k, rotate_on_read, bounds = keys.k, keys.rotate_on_read, keys.bounds_N2
    if bounds is None:
        ranges = keys.ranges if keys.ranges is not None else ((0, k.shape[1]),)
        bounds = on_device(tuple(map(tuple, ranges)), q_BTHD.device, torch.int32)
    block = max(16 if rotate_on_read is None else 32, triton.next_power_of_2(width))
    if rotate_on_read is not None and (q_BTHD.dtype == torch.float32 or 4 * rotate_on_read.table.shape[2] > block):
        k, rotate_on_read = (
            rotated(k, rotate_on_read),
            None,
        )  # no registers are left to turn queries in, or more than half of a head turns
    size = tile(queries, width, q_BTHD.dtype, rotate_on_read is not None, architecture(q_BTHD.device))
    programs = triton.cdiv(queries, size.queries) * batch * heads
    count = shares(programs, k.shape[1], q_BTHD.device)
    out = torch.empty(count, batch, queries, heads, width, dtype=q_BTHD.dtype, device=q_BTHD.device)
    lse = torch.empty(count, batch, queries, heads, dtype=torch.float32, device=q_BTHD.device)
    with launching_on(q_BTHD):
        attention_kernel[triton.cdiv(queries, size.queries), batch * heads, count](
            q_BTHD, k, keys.v, out, lse, bounds, None if rotate_on_read is None else rotate_on_read.table,
            queries, heads, 1 if rotate_on_read is None else rotate_on_read.tokens, width**-0.5 * LOG2_E,
            *q_BTHD.stride()[:3], *k.stride()[:3], *keys.v.stride()[:3],
            RANGES=len(bounds), SHARES=count,
            ON_READ_PAIRS=0 if rotate_on_read is None else rotate_on_read.table.shape[2],
            WIDTH=width, BLOCK=block, SLICE=min(size.channels or block, block), QUERIES=size.queries, KEYS=size.keys,
            num_warps=size.warps, num_stages=size.stages,
        )  # fmt: skip
    return list(zip(out, lse, strict=True))
