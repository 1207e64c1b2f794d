"""The Triton kernel of flash attention (arXiv 2307.08691) over ranges of a ring of keys, with its log-sum-exp.

The kernel reads the bounds of the ranges on the device, so that one captured graph serves a window that fills and one
that is full. Heads may have ranges of their own; all are attended in one launch.

Rotation on read (the `relative` policy) is applied to the queries instead of the keys: a rotation may move to the other
side of a product, and all keys of a slot share one rotation, so the kernel rotates the queries back, once per slot. The
rotated queries are rounded once more, which makes the error of the log-sum-exp up to five times that of rotated keys
(1e-4 in bfloat16, which a merge does not notice); the error of the output hardly grows.

The kernel computes 4·T·L·H·d FLOPs. Shapes: B batch, T queries, L keys, H heads, d head width, N ranges.
"""

from __future__ import annotations

import triton
import triton.language as tl

from causalrope_kernels.quantized_heads_kernel import load_scales, widened

LN_2 = tl.constexpr(0.6931471805599453)


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
    q, k, v, out, lse, bounds, rotate_on_read, k_scales, v_scales, tiles,
    queries, heads, slot_tokens, scale,
    q_batch, q_token, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head,
    RANGES: tl.constexpr, BY_HEAD: tl.constexpr, BANDS: tl.constexpr, SHARES: tl.constexpr,
    ON_READ_PAIRS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, SLICE: tl.constexpr, QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):  # fmt: skip
    """Program (i, b·H + h, n) attends the i-th block of queries of head h on the n-th share of every range.

    `bounds` are (RANGES, 2), or with BY_HEAD (H, RANGES, 2). Such lists are long, so that their loop is not unrolled.
    With BANDS the i-th line of `tiles` has the queries [first, stop) and the tokens [first, stop) of every slot that
    they see.
    `scale` is log2(e)/√d, so that scores are exponents of two.
    """
    batch, head = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    if BANDS:
        tiles += 4 * tl.program_id(0)
        token = tl.load(tiles) + tl.arange(0, QUERIES)
        q_valid = token < tl.load(tiles + 1)
        seen, seen_stop = tl.load(tiles + 2), tl.load(tiles + 3)
    else:
        token = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
        q_valid = token < queries
        seen, seen_stop = 0, slot_tokens
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
    if BY_HEAD:
        bounds += head * (2 * RANGES)
    for number in tl.range(RANGES, num_stages=1, loop_unroll_factor=1 if BY_HEAD else RANGES):
        first, stop = tl.load(bounds + 2 * number), tl.load(bounds + 2 * number + 1)
        unit = slot_tokens if ON_READ_PAIRS or BANDS else KEYS
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
                    k_scales, v_scales, slot * slot_tokens + seen, slot * slot_tokens + seen_stop, k_row, v_row, scale,
                    KEYS, WIDTH, BLOCK, SLICE,
                )  # fmt: skip
        elif BANDS:
            query = _load(q, q_offsets, q_valid, 0, BLOCK, WIDTH, True)
            for slot in tl.range(first // slot_tokens, stop // slot_tokens, num_stages=1):
                total, weights, largest = _contiguous(
                    total, weights, largest, query, query, q, q_offsets, q_valid, k, v, k_scales, v_scales,
                    slot * slot_tokens + seen, slot * slot_tokens + seen_stop, k_row, v_row, scale,
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
