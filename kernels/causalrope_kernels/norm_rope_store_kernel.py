"""q, k, v straight to where they go next: from the packed projection, normed and rotated, or as they arrived; and
tokens of all ranks to the pieces that go back.

All read every number once and write it once, 6·T·D numbers for q, k, v together. A out's strides are counted in rows
of d numbers, head by head, so that any split of the heads over the pieces of a send buffer is the same kernel.
Shapes: B batch, F frames, s tokens of a frame, H heads, d head width, D = H·d, E angles of an axis.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from causalrope_kernels.add_norm_kernel import warps
from causalrope_kernels.arguments import Projection, Slots, SlotsByHeads
from causalrope_kernels.tables import Lines, launching_on, on_device

FIELDS = tl.constexpr(4)  # of a head in a out: where it begins, and the steps of batch, frame and token


@triton.jit
def _rows(table, slots, batch, frame, token, head, there, SLOTS: tl.constexpr):
    """Where the token's heads go, in rows of d numbers."""
    if SLOTS:
        frame = tl.load(slots + frame)
    field = tl.arange(0, FIELDS)
    line = tl.load(table + head[:, None] * FIELDS + field[None, :], mask=there[:, None], other=0)
    times = tl.where(field == 0, 1, tl.where(field == 1, batch, tl.where(field == 2, frame, token)))
    return tl.sum(line * times[None, :].to(tl.int32), 1).to(tl.int64)


@triton.jit
def _axis(table, offset, pair, first, PAIRS: tl.constexpr):
    """Cosines and sines of one axis at its pairs, and zeros at those of the others."""
    mine = (pair >= first) & (pair < first + PAIRS)
    angle = table + offset * 2 * PAIRS + (pair - first)
    cos = tl.load(angle, mask=mine, other=0.0).to(tl.float32)
    return cos, tl.load(angle + PAIRS, mask=mine, other=0.0).to(tl.float32)


@triton.jit
def _norm_rotate(
    x, weight, out, rows, time, row_cos, row_sin, times, frame, mask, eps,
    TIMES: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Norm over all heads, rotate, write."""
    head, channel = tl.arange(0, HEADS), tl.arange(0, BLOCK)
    offset = head[:, None] * WIDTH + channel[None, :]
    value = tl.load(x + offset, mask=mask, other=0.0).to(tl.float32)
    spread = tl.rsqrt(tl.sum(value * value) / DIM + eps)
    value = value * spread * tl.load(weight + offset, mask=mask, other=0.0).to(tl.float32)
    when_cos, when_sin = _axis(time, tl.load(times + frame).to(tl.int64), tl.arange(0, BLOCK // 2), 0, TIMES)
    cos, sin = (row_cos + when_cos)[None, :], (row_sin + when_sin)[None, :]
    even, odd = tl.split(tl.reshape(value, [HEADS, BLOCK // 2, 2]))
    rotated = tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), [HEADS, BLOCK])
    tl.store(out + rows[:, None] * WIDTH + channel[None, :], rotated.to(out.dtype.element_ty), mask=mask)


@triton.jit(
    do_not_specialize=["start", "tokens", "frames", "columns"],
    do_not_specialize_on_alignment=["q_times", "k_times", "q_slots", "k_slots", "v_slots"],
)
def projection_kernel(
    qkv, q_weight, k_weight, q_out, k_out, v_out, q_table, k_table, v_table, q_slots, k_slots, v_slots,
    time, row, column, q_times, k_times, start, tokens, frames, columns, eps, by_batch, by_frame, by_token,
    Q: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    Q_SLOTS: tl.constexpr, K_SLOTS: tl.constexpr, V_SLOTS: tl.constexpr,
    TIMES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    COUNT: tl.constexpr, WIDTH: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (j, b·F + f): token j of frame f. COUNT heads of WIDTH numbers, in a tile of HEADS × BLOCK."""
    token = tl.program_id(0)
    batch, frame = tl.program_id(1) // frames, tl.program_id(1) % frames
    head, channel = tl.arange(0, HEADS), tl.arange(0, BLOCK)
    there = head < COUNT
    mask = there[:, None] & (channel < WIDTH)[None, :]
    x = qkv + batch.to(tl.int64) * by_batch + frame.to(tl.int64) * by_frame + token.to(tl.int64) * by_token
    pair = tl.arange(0, BLOCK // 2)
    y_cos, y_sin = _axis(row, (start + token) // columns, pair, TIMES, ROWS)
    x_cos, x_sin = _axis(column, (start + token) % columns, pair, TIMES + ROWS, COLUMNS)
    row_cos, row_sin = y_cos + x_cos, y_sin + x_sin
    if Q:
        rows = _rows(q_table, q_slots, batch, frame, token, head, there, Q_SLOTS)
        _norm_rotate(x, q_weight, q_out, rows, time, row_cos, row_sin, q_times, frame, mask, eps,
              TIMES, COUNT * WIDTH, WIDTH, HEADS, BLOCK)  # fmt: skip
    if K:
        rows = _rows(k_table, k_slots, batch, frame, token, head, there, K_SLOTS)
        _norm_rotate(x + COUNT * WIDTH, k_weight, k_out, rows, time, row_cos, row_sin, k_times, frame, mask, eps,
              TIMES, COUNT * WIDTH, WIDTH, HEADS, BLOCK)  # fmt: skip
    if V:
        rows = _rows(v_table, v_slots, batch, frame, token, head, there, V_SLOTS)
        value = tl.load(x + 2 * COUNT * WIDTH + head[:, None] * WIDTH + channel[None, :], mask=mask, other=0.0)
        tl.store(v_out + rows[:, None] * WIDTH + channel[None, :], value, mask=mask)


@triton.jit(
    do_not_specialize=["batches", "frames", "all_frames"],
    do_not_specialize_on_alignment=["q_slots", "k_slots", "v_slots"],
)
def pieces_kernel(
    pieces, offsets, q_out, k_out, v_out, q_table, k_table, v_table, q_slots, k_slots, v_slots,
    batches, frames, all_frames,
    Q: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    Q_SLOTS: tl.constexpr, K_SLOTS: tl.constexpr, V_SLOTS: tl.constexpr,
    KINDS: tl.constexpr, COUNT: tl.constexpr, WIDTH: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (j, b·F + f): token j of frame f, of all ranks' tokens. `offsets` holds, in rows of d numbers, where the
    token begins in its piece and how far it is from a frame to the next."""
    token = tl.program_id(0)
    batch, frame = tl.program_id(1) // frames, tl.program_id(1) % frames
    head, channel = tl.arange(0, HEADS), tl.arange(0, BLOCK)
    there = head < COUNT
    mask = there[:, None] & (channel < WIDTH)[None, :]
    begin, by_frame = tl.load(offsets + 2 * token).to(tl.int64), tl.load(offsets + 2 * token + 1).to(tl.int64)
    first = begin + (batch * all_frames + frame) * by_frame
    by_kind = batches * all_frames * by_frame
    offset = head[:, None] * WIDTH + channel[None, :]
    if Q:
        rows = _rows(q_table, q_slots, batch, frame, token, head, there, Q_SLOTS)
        value = tl.load(pieces + (first + (KINDS - 3) * by_kind) * WIDTH + offset, mask=mask, other=0.0)
        tl.store(q_out + rows[:, None] * WIDTH + channel[None, :], value, mask=mask)
    if K:
        rows = _rows(k_table, k_slots, batch, frame, token, head, there, K_SLOTS)
        value = tl.load(pieces + (first + (KINDS - 2) * by_kind) * WIDTH + offset, mask=mask, other=0.0)
        tl.store(k_out + rows[:, None] * WIDTH + channel[None, :], value, mask=mask)
    if V:
        rows = _rows(v_table, v_slots, batch, frame, token, head, there, V_SLOTS)
        value = tl.load(pieces + (first + (KINDS - 1) * by_kind) * WIDTH + offset, mask=mask, other=0.0)
        tl.store(v_out + rows[:, None] * WIDTH + channel[None, :], value, mask=mask)


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
    """Program (j, b·F + f): all NUMBERS of token j of frame f, to its piece; `offsets` as above."""
    token = tl.program_id(0)
    batch, frame = (tl.program_id(1) // frames).to(tl.int64), (tl.program_id(1) % frames).to(tl.int64)
    number = tl.arange(0, BLOCK)
    value = tl.load(
        x + batch * by_batch + frame * by_frame + token.to(tl.int64) * by_token + number, mask=number < NUMBERS
    )
    begin, piece_frame = tl.load(offsets + 2 * token).to(tl.int64), tl.load(offsets + 2 * token + 1).to(tl.int64)
    row = begin + (batch * frames + frame) * piece_frame
    tl.store(pieces + row * WIDTH + number, value, mask=number < NUMBERS)


def store_projection(projection: Projection, q: SlotsByHeads, k: SlotsByHeads, v: SlotsByHeads) -> None:
    qkv, rotation = projection.qkv_BFSN, projection.rotation
    batch, frames, tokens, heads, width = projection.shape
    outputs, constants = _arguments(q, k, v, qkv, width)
    if qkv.numel() == 0 or not (q or k or v):
        return
    block, tile = triton.next_power_of_2(width), triton.next_power_of_2(heads)
    with launching_on(qkv):
        projection_kernel[tokens, batch * frames](
            qkv, projection.q_weight, projection.k_weight, *outputs,
            rotation.time, rotation.row, rotation.column, rotation.query_times_F, rotation.key_times_F,
            rotation.start, tokens, frames, rotation.columns, projection.eps, *qkv.stride()[:3], **constants,
            TIMES=rotation.time.shape[2], ROWS=rotation.row.shape[2], COLUMNS=rotation.column.shape[2],
            COUNT=heads, WIDTH=width, HEADS=tile, BLOCK=block, num_warps=warps(2 * tile * block),
        )  # fmt: skip


def store_pieces(pieces: Sequence[Tensor], q: SlotsByHeads, k: SlotsByHeads, v: SlotsByHeads) -> None:
    pieces = [piece for piece in pieces if piece.numel()]  # an empty one has no address in memory
    if not pieces:
        return
    kinds, batch, frames, _, heads, width = pieces[0].shape
    outputs, constants = _arguments(q, k, v, pieces[0], width)
    tokens = sum(piece.shape[3] for piece in pieces)
    if not (q or k or v):
        return
    block, tile = triton.next_power_of_2(width), triton.next_power_of_2(heads)
    with launching_on(pieces[0]):
        pieces_kernel[tokens, batch * frames](
            pieces[0], _offsets(pieces), *outputs, batch, frames,
            pieces[0].stride(1) // pieces[0].stride(2), **constants,
            KINDS=kinds, COUNT=heads, WIDTH=width, HEADS=tile, BLOCK=block, num_warps=warps(2 * tile * block),
        )  # fmt: skip


def split_tokens(x_BFSHD: Tensor, pieces: Sequence[Tensor]) -> None:
    batch, frames, tokens, heads, width = x_BFSHD.shape
    pieces = [piece for piece in pieces if piece.numel()]
    if x_BFSHD.numel():
        block = triton.next_power_of_2(heads * width)
        with launching_on(x_BFSHD):
            split_kernel[tokens, batch * frames](
                x_BFSHD, pieces[0], _offsets([piece.unsqueeze(0) for piece in pieces]), frames, *x_BFSHD.stride()[:3],
                WIDTH=width, NUMBERS=heads * width, BLOCK=block, num_warps=warps(block),
            )  # fmt: skip


def _arguments(
    q: SlotsByHeads, k: SlotsByHeads, v: SlotsByHeads, unused: Tensor, width: int
) -> tuple[tuple[Tensor, ...], dict[str, bool]]:
    """The kernel's arguments of the outputs: where each begins, its table and its slots, and which there are."""
    given = {"Q": q, "K": k, "V": v}
    first = [outputs[0].x if outputs else unused for outputs in given.values()]
    tables = [_table(outputs, width) if outputs else unused for outputs in given.values()]
    slots = [outputs[0].slots_F if outputs and outputs[0].slots_F is not None else unused for outputs in given.values()]
    constants = {name: bool(outputs) for name, outputs in given.items()}
    constants |= {f"{name}_SLOTS": bool(outputs) and outputs[0].slots_F is not None for name, outputs in given.items()}
    return (*first, *tables, *slots), constants


def _table(outputs: Sequence[Slots], width: int) -> Tensor:
    """Of every head: its first row, counted from the first out, and the rows from batch to batch, frame to frame,
    token to token."""
    first = outputs[0].x
    lines = []
    for number, out in enumerate(outputs):
        apart = out.x.data_ptr() - first.data_ptr()
        steps = [apart // first.element_size(), *out.x.stride()[:4]]
        if apart % first.element_size() or any(step % width for step in steps):
            raise ValueError(
                f"outputs[{number}]: expected strides, and a distance from the first out, that the head width {width} "
                f"divides, as in one buffer, not {steps}"
            )
        begin, by_batch, by_frame, by_token, by_head = (step // width for step in steps)
        lines += [(begin + head * by_head, by_batch, by_frame, by_token) for head in range(out.x.shape[3])]
    return on_device(tuple(lines), first.device, torch.int32)


def _offsets(pieces: Sequence[Tensor]) -> Tensor:
    """Of every token of a frame: its first row, counted from the first piece, and the rows from frame to frame."""
    first, width = pieces[0], pieces[0].shape[5]
    lines = []
    for number, piece in enumerate(pieces):
        apart = (piece.data_ptr() - first.data_ptr()) // first.element_size()
        by_token = piece.stride(3) if piece.shape[3] > 1 else 0
        by_frame = piece.stride(2) if piece.shape[2] > 1 else piece.stride(1)
        spacing = piece.shape[2] == 1 or piece.stride(1) == first.stride(1) // first.stride(2) * by_frame
        if (
            any(step % width for step in (apart, by_token, by_frame))
            or not spacing
            or piece.stride(0) != piece.shape[1] * piece.stride(1)
        ):
            raise ValueError(f"pieces[{number}]: expected whole frames of one buffer, not strides {piece.stride()}")
        lines.append((apart // width, by_token // width, piece.shape[3], by_frame // width))
    return _token_by_token(tuple(lines), first.device)


@lru_cache(maxsize=256)
def _token_by_token(pieces: Lines, device: torch.device) -> Tensor:
    lines = [(begin + token * step, by_frame) for begin, step, count, by_frame in pieces for token in range(count)]
    return on_device(tuple(lines), device, torch.int32)
