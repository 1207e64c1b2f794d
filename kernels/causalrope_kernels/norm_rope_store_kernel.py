"""Triton kernels that write q, k, v to their slots, and the tokens of all ranks to the pieces of a send buffer.

q, k and v come from the packed projection, to be normed and rotated, or from received pieces, to be copied. Every
kernel reads every number once and writes it once: 6·T·D numbers for q, k and v. Strides of an output are counted in
rows of d numbers, head by head, so that one kernel serves any split of the heads over the pieces of a send buffer.

Shapes: B batch, F frames, s tokens of a frame, T = F·s, H heads, d head width, D = H·d, E angles of an axis.
"""

from __future__ import annotations

import triton
import triton.language as tl

from causalrope_kernels.quantized_heads_kernel import quantized

FIELDS = tl.constexpr(4)  # of a head's line in an output's table: its first row, and the steps of batch, frame, token
NO_SLOTS, ONE_RING, RINGS = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # of an output


@triton.jit
def _rows(table, slots, batch, frame, frames, token, head, valid, COUNT: tl.constexpr, SLOTS: tl.constexpr):
    """The rows of d numbers that a token's heads are written to. If heads are in several rings, their lines are
    followed by the row of `slots` that each head has."""
    field = tl.arange(0, FIELDS)
    line = tl.load(table + head[:, None] * FIELDS + field[None, :], mask=valid[:, None], other=0)
    if SLOTS == RINGS:
        ring = tl.load(table + COUNT * FIELDS + head, mask=valid, other=0)
        slot = tl.load(slots + ring * frames + frame, mask=valid, other=0).to(line.dtype)
        times = tl.where(field == 0, 1, tl.where(field == 1, batch, token))[None, :].to(line.dtype)
        return tl.sum(line * tl.where(field[None, :] == 2, slot[:, None], times), 1).to(tl.int64)
    if SLOTS == ONE_RING:
        frame = tl.load(slots + frame)
    times = tl.where(field == 0, 1, tl.where(field == 1, batch, tl.where(field == 2, frame, token)))
    return tl.sum(line * times[None, :].to(line.dtype), 1).to(tl.int64)


@triton.jit
def _axis(table, offset, pair, first, PAIRS: tl.constexpr):
    """Cosines and sines of one axis at its channel pairs, and zeros at the pairs of the other axes."""
    mask = (pair >= first) & (pair < first + PAIRS)
    angle = table + offset * 2 * PAIRS + (pair - first)
    cos = tl.load(angle, mask=mask, other=0.0).to(tl.float32)
    return cos, tl.load(angle + PAIRS, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _put(value, out, rows, scales, scale_rows, offset, valid, mask, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Writes a token's heads to their rows, quantized if there are scales."""
    channel = tl.arange(0, BLOCK)
    target = out + rows[:, None] * WIDTH + channel[None, :]
    if scales is None:
        tl.store(target, value.to(out.dtype.element_ty), mask=mask)
    else:
        value = value.to(tl.float32)
        if offset is not None:
            value -= tl.load(offset, mask=mask, other=0.0).to(tl.float32)
        numbers, scale = quantized(value, out.dtype.element_ty == tl.uint8)
        tl.store(target, numbers, mask=mask)
        tl.store(scales + scale_rows, scale, mask=valid)


@triton.jit
def _copy(source, row, out, rows, mask, WIDTH: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr):
    """Copies a token's heads, which follow each other from a row of the source on, to their rows."""
    head, channel = tl.arange(0, HEADS), tl.arange(0, BLOCK)
    number = head[:, None] * WIDTH + channel[None, :]
    value = tl.load(source + row * WIDTH + number, mask=mask, other=0)
    tl.store(out + rows[:, None] * WIDTH + channel[None, :], value, mask=mask)


@triton.jit
def _piece_row(table, token, batch, frame, all_frames):
    """The first row of a token in its piece, and the step from frame to frame."""
    begin, by_frame = tl.load(table + 2 * token).to(tl.int64), tl.load(table + 2 * token + 1).to(tl.int64)
    return begin + (batch * all_frames + frame) * by_frame, by_frame


@triton.jit
def _norm_rotate(
    x, weight, out, rows, scales, scale_rows, offset, valid, time, row_cos, row_sin, times, frame, mask, eps,
    TIMES: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Norms a token over all heads, rotates it and writes it."""
    head, channel = tl.arange(0, HEADS), tl.arange(0, BLOCK)
    number = head[:, None] * WIDTH + channel[None, :]
    value = tl.load(x + number, mask=mask, other=0.0).to(tl.float32)
    spread = tl.rsqrt(tl.sum(value * value) / DIM + eps)
    value = value * spread * tl.load(weight + number, mask=mask, other=0.0).to(tl.float32)
    time_cos, time_sin = _axis(time, tl.load(times + frame).to(tl.int64), tl.arange(0, BLOCK // 2), 0, TIMES)
    cos, sin = (row_cos + time_cos)[None, :], (row_sin + time_sin)[None, :]
    even, odd = tl.split(tl.reshape(value, [HEADS, BLOCK // 2, 2]))
    rotated = tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), [HEADS, BLOCK])
    _put(rotated, out, rows, scales, scale_rows, offset, valid, mask, WIDTH, BLOCK)


@triton.jit(
    do_not_specialize=["start", "tokens", "frames", "columns"],
    do_not_specialize_on_alignment=["q_times", "k_times", "q_slots", "k_slots", "v_slots"],
)
def projection_kernel(
    qkv, q_weight, k_weight, k_offset, q_out, k_out, v_out, q_table, k_table, v_table, q_slots, k_slots, v_slots,
    k_scales, v_scales, k_scale_table, v_scale_table, time, row, column, q_times, k_times,
    start, tokens, frames, columns, eps, by_batch, by_frame, by_token,
    Q: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    Q_SLOTS: tl.constexpr, K_SLOTS: tl.constexpr, V_SLOTS: tl.constexpr,
    TIMES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    COUNT: tl.constexpr, WIDTH: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (j, b·F + f) writes token j of frame f: COUNT heads of WIDTH numbers, in a tile of HEADS × BLOCK."""
    token = tl.program_id(0)
    batch, frame = tl.program_id(1) // frames, tl.program_id(1) % frames
    head, channel = tl.arange(0, HEADS), tl.arange(0, BLOCK)
    valid = head < COUNT
    mask = valid[:, None] & (channel < WIDTH)[None, :]
    x = qkv + batch.to(tl.int64) * by_batch + frame.to(tl.int64) * by_frame + token.to(tl.int64) * by_token
    pair = tl.arange(0, BLOCK // 2)
    y_cos, y_sin = _axis(row, (start + token) // columns, pair, TIMES, ROWS)
    x_cos, x_sin = _axis(column, (start + token) % columns, pair, TIMES + ROWS, COLUMNS)
    row_cos, row_sin = y_cos + x_cos, y_sin + x_sin
    if Q:
        rows = _rows(q_table, q_slots, batch, frame, frames, token, head, valid, COUNT, Q_SLOTS)
        _norm_rotate(x, q_weight, q_out, rows, None, None, None, valid, time, row_cos, row_sin, q_times, frame, mask,
              eps, TIMES, COUNT * WIDTH, WIDTH, HEADS, BLOCK)  # fmt: skip
    if K:
        rows = _rows(k_table, k_slots, batch, frame, frames, token, head, valid, COUNT, K_SLOTS)
        scale_rows = rows  # unused without scales; Triton 3.6 returns no None from a function
        if k_scale_table is not None:
            scale_rows = _rows(k_scale_table, k_slots, batch, frame, frames, token, head, valid, COUNT, K_SLOTS)
        offset = None
        if k_offset is not None:
            offset = k_offset + (batch * COUNT + head[:, None]) * WIDTH + channel[None, :]
        _norm_rotate(x + COUNT * WIDTH, k_weight, k_out, rows, k_scales, scale_rows, offset, valid, time, row_cos,
              row_sin, k_times, frame, mask, eps, TIMES, COUNT * WIDTH, WIDTH, HEADS, BLOCK)  # fmt: skip
    if V:
        rows = _rows(v_table, v_slots, batch, frame, frames, token, head, valid, COUNT, V_SLOTS)
        value = tl.load(x + 2 * COUNT * WIDTH + head[:, None] * WIDTH + channel[None, :], mask=mask, other=0.0)
        scale_rows = rows
        if v_scale_table is not None:
            scale_rows = _rows(v_scale_table, v_slots, batch, frame, frames, token, head, valid, COUNT, V_SLOTS)
        _put(value, v_out, rows, v_scales, scale_rows, None, valid, mask, WIDTH, BLOCK)


@triton.jit(
    do_not_specialize=["batches", "frames", "all_frames"],
    do_not_specialize_on_alignment=["q_slots", "k_slots", "v_slots"],
)
def pieces_kernel(
    q_pieces, q_offsets, kv_pieces, kv_offsets, scale_pieces, scale_offsets,
    q_out, k_out, v_out, q_table, k_table, v_table, q_slots, k_slots, v_slots,
    k_scales, v_scales, k_scale_table, v_scale_table, batches, frames, all_frames,
    Q: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    Q_SLOTS: tl.constexpr, K_SLOTS: tl.constexpr, V_SLOTS: tl.constexpr,
    FIRST: tl.constexpr, COUNT: tl.constexpr, WIDTH: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (j, b·F + f) writes token j of frame f, counted over all ranks' tokens.

    Offsets hold for every token, in rows of d numbers, its first row and the step from frame to frame in its piece. k
    is number FIRST of the kinds of `kv_pieces`, v the next. Scales, in rows of one, are of k and then of v.
    """
    token = tl.program_id(0)
    batch, frame = tl.program_id(1) // frames, tl.program_id(1) % frames
    head, channel = tl.arange(0, HEADS), tl.arange(0, BLOCK)
    valid = head < COUNT
    mask = valid[:, None] & (channel < WIDTH)[None, :]
    if Q:
        first, _ = _piece_row(q_offsets, token, batch, frame, all_frames)
        rows = _rows(q_table, q_slots, batch, frame, frames, token, head, valid, COUNT, Q_SLOTS)
        _copy(q_pieces, first, q_out, rows, mask, WIDTH, HEADS, BLOCK)
    first, by_frame = _piece_row(kv_offsets, token, batch, frame, all_frames)
    by_kind = batches * all_frames * by_frame
    if K:
        rows = _rows(k_table, k_slots, batch, frame, frames, token, head, valid, COUNT, K_SLOTS)
        _copy(kv_pieces, first + FIRST * by_kind, k_out, rows, mask, WIDTH, HEADS, BLOCK)
    if V:
        rows = _rows(v_table, v_slots, batch, frame, frames, token, head, valid, COUNT, V_SLOTS)
        _copy(kv_pieces, first + (FIRST + 1) * by_kind, v_out, rows, mask, WIDTH, HEADS, BLOCK)
    if scale_pieces is not None:
        first, by_frame = _piece_row(scale_offsets, token, batch, frame, all_frames)
        if K:
            rows = _rows(k_scale_table, k_slots, batch, frame, frames, token, head, valid, COUNT, K_SLOTS)
            tl.store(k_scales + rows, tl.load(scale_pieces + first + head, mask=valid), mask=valid)
        if V:
            first += batches * all_frames * by_frame
            rows = _rows(v_scale_table, v_slots, batch, frame, frames, token, head, valid, COUNT, V_SLOTS)
            tl.store(v_scales + rows, tl.load(scale_pieces + first + head, mask=valid), mask=valid)


@triton.jit(do_not_specialize=["frames"])
def split_kernel(
    x,
    pieces,
    offsets,
    frames,
    by_batch,
    by_frame,
    by_token,
    WIDTH: tl.constexpr,
    NUMBERS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program (j, b·F + f) writes all NUMBERS of token j of frame f to its piece; `offsets` as in `pieces_kernel`."""
    token = tl.program_id(0)
    batch, frame = (tl.program_id(1) // frames).to(tl.int64), (tl.program_id(1) % frames).to(tl.int64)
    number = tl.arange(0, BLOCK)
    value = tl.load(
        x + batch * by_batch + frame * by_frame + token.to(tl.int64) * by_token + number, mask=number < NUMBERS
    )
    begin, piece_frame = tl.load(offsets + 2 * token).to(tl.int64), tl.load(offsets + 2 * token + 1).to(tl.int64)
    row = begin + (batch * frames + frame) * piece_frame
    tl.store(pieces + row * WIDTH + number, value, mask=number < NUMBERS)
