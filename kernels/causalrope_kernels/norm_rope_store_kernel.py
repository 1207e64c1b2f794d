"""Triton kernels that write q, k, v to their slots, and the tokens of all ranks to the pieces of a send buffer.

q, k and v come from the packed projection, to be normed and rotated, or from received pieces, to be copied. Every
kernel reads every number once and writes it once: 6·T·D numbers for q, k and v. Strides of an output are counted in
rows of d numbers, head by head, so that one kernel serves any split of the heads over the pieces of a send buffer.

Shapes: B batch, F frames, s tokens of a frame, T = F·s, H heads, d head width, D = H·d, E angles of an axis.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cache
from itertools import chain

import torch
import triton
import triton.language as tl
from torch import Tensor

from causalrope_kernels.add_norm_kernel import warps_of
from causalrope_kernels.arguments import Pieces, Projection, QuantizedPieces, Slots, SlotsByHeads, Source
from causalrope_kernels.launch import Kernel, padded
from causalrope_kernels.quantized_heads import as_bits
from causalrope_kernels.quantized_heads_kernel import quantized
from causalrope_kernels.tables import Lines, is_aligned, on_device

Tensors = tuple[Tensor | None, ...]
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
def _scale_rows(table, slots, batch, frame, frames, token, head, valid, COUNT: tl.constexpr, SLOTS: tl.constexpr):
    """The rows of the scales of a token's heads; None without a table."""
    if table is None:
        return None
    else:
        return _rows(table, slots, batch, frame, frames, token, head, valid, COUNT, SLOTS)


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
        scale_rows = _scale_rows(k_scale_table, k_slots, batch, frame, frames, token, head, valid, COUNT, K_SLOTS)
        offset = None
        if k_offset is not None:
            offset = k_offset + (batch * COUNT + head[:, None]) * WIDTH + channel[None, :]
        _norm_rotate(x + COUNT * WIDTH, k_weight, k_out, rows, k_scales, scale_rows, offset, valid, time, row_cos,
              row_sin, k_times, frame, mask, eps, TIMES, COUNT * WIDTH, WIDTH, HEADS, BLOCK)  # fmt: skip
    if V:
        rows = _rows(v_table, v_slots, batch, frame, frames, token, head, valid, COUNT, V_SLOTS)
        value = tl.load(x + 2 * COUNT * WIDTH + head[:, None] * WIDTH + channel[None, :], mask=mask, other=0.0)
        scale_rows = _scale_rows(v_scale_table, v_slots, batch, frame, frames, token, head, valid, COUNT, V_SLOTS)
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


def store(
    source: Source,
    q: SlotsByHeads = (),
    k: SlotsByHeads = (),
    v: SlotsByHeads = (),
    k_offset: Tensor | None = None,
) -> None:
    """Launches the kernel of the source; see `operations.norm_rope_store`, which checks the arguments."""
    if isinstance(source, Projection):
        store_projection(source, q, k, v, k_offset)
    else:
        store_pieces(source, q, k, v)


PROJECTION, PIECES, SPLIT = Kernel(projection_kernel), Kernel(pieces_kernel), Kernel(split_kernel)


def store_projection(
    projection: Projection, q: SlotsByHeads, k: SlotsByHeads, v: SlotsByHeads, k_offset: Tensor | None = None
) -> None:
    """Launches `projection_kernel`; see `operations.norm_rope_store`, which checks the arguments."""
    qkv, rotation = projection.qkv_BFSN, projection.rotation
    if qkv.numel() == 0 or not (q or k or v):
        return
    weights = projection.q_weight, projection.k_weight
    vectors = *weights, k_offset
    times = rotation.time, rotation.row, rotation.column, rotation.query_times_F, rotation.key_times_F
    if max(len(q), len(k), len(v)) > 1:
        outputs, present = _outputs(q, k, v, qkv, projection.shape[4])
        grid, numbers, constants, warps = _sizes(projection, present)
        return PROJECTION.launch(grid, (qkv, *vectors, *outputs, *times), numbers, constants, num_warps=warps)
    own = qkv.shape, qkv.stride(), qkv.dtype, qkv.device, is_aligned(qkv), *map(_kind, weights)
    layouts = [outputs[0].layout if outputs else None for outputs in (q, k, v)]
    offset = None if k_offset is None else _kind(k_offset)
    key = projection.heads, projection.eps, rotation.sizes, own, offset, *layouts
    found = _STORES.get(key)
    if found is None:
        outputs, present = _outputs(q, k, v, qkv, projection.shape[4])
        grid, numbers, constants, warps = _sizes(projection, present)
        tensors = qkv, *vectors, *outputs, *times
        launch = PROJECTION.prepared(grid, tensors, numbers, constants, num_warps=warps)
        _STORES[key] = launch, outputs[3:6], outputs[11:]
        return
    launch, tables, scale_tables = found
    first = [outputs[0].bits if outputs else qkv for outputs in (q, k, v)]
    slots = [qkv if not outputs or outputs[0].slots_F is None else outputs[0].slots_F for outputs in (q, k, v)]
    launch(qkv, *vectors, *first, *tables, *slots, *_scales(k, v), *scale_tables, *times)


# by layout: the launch, the tables of q, k and v, and those of the scales
_STORES: dict[tuple[object, ...], tuple[Callable[..., None], Tensors, Tensors]] = {}


def _sizes(
    projection: Projection, present: tuple[int, ...]
) -> tuple[tuple[int, int], tuple[float, ...], tuple[int, ...], int]:
    """The grid of `projection_kernel`, its numbers, constants and warps."""
    batch, frames, tokens, heads, width = projection.shape
    start, _, columns, *pairs = projection.rotation.sizes
    block, tile = padded(width), padded(heads)
    numbers = start, tokens, frames, columns, projection.eps, *projection.qkv_BFSN.stride()[:3]
    constants = *present, *pairs, heads, width, tile, block
    return (tokens, batch * frames), numbers, constants, warps_of(2 * tile * block)


def _kind(vector: Tensor) -> tuple[torch.dtype, bool]:
    return vector.dtype, is_aligned(vector)


def store_pieces(source: Pieces | QuantizedPieces, q: SlotsByHeads, k: SlotsByHeads, v: SlotsByHeads) -> None:
    """Launches `pieces_kernel`; see `operations.norm_rope_store`, which checks the arguments."""
    _, _, tokens, heads, width = source.shape
    given = source.pieces if isinstance(source, Pieces) else map(as_bits, source.numbers)
    pieces, first_key = _filled(given), 0
    if not pieces or not (q or k or v):
        return
    if isinstance(source, Pieces):
        first_key = len(pieces[0]) - 2
        inputs: Tensors = pieces[0], _offsets(pieces), pieces[0], _offsets(pieces), None, None
    else:
        queries = _filled([piece.unsqueeze(0) for piece in source.q]) or pieces  # these are not read
        scales = _filled([piece.unsqueeze(-1) for piece in source.scales])
        inputs = tuple(x for kind in (queries, pieces, scales) for x in (kind[0], _offsets(kind)))
    first = pieces[0]
    batch, frames = first.shape[1:3]
    outputs, present = _outputs(q, k, v, first, width)
    block, tile = padded(width), padded(heads)
    PIECES.launch(
        (tokens, batch * frames),
        (*inputs, *outputs),
        (batch, frames, first.stride(1) // first.stride(2)),
        (*present, first_key, heads, width, tile, block),
        num_warps=warps_of(2 * tile * block),
    )


def _filled(pieces: Iterable[Tensor]) -> list[Tensor]:
    """The pieces that hold numbers: an empty one has no address in memory."""
    return [piece for piece in pieces if piece.numel()]


def split_tokens(x_BFSHD: Tensor, pieces: Sequence[Tensor]) -> None:
    """Launches `split_kernel`; see `operations.split_tokens`, which checks the arguments."""
    batch, frames, tokens, heads, width = x_BFSHD.shape
    pieces = [piece for piece in pieces if piece.numel()]
    if x_BFSHD.numel():
        block = padded(heads * width)
        offsets = _offsets([piece.unsqueeze(0) for piece in pieces])
        grid, numbers = (tokens, batch * frames), (frames, *x_BFSHD.stride()[:3])
        constants = width, heads * width, block
        SPLIT.launch(grid, (x_BFSHD, pieces[0], offsets), numbers, constants, num_warps=warps_of(block))


def _outputs(
    q: SlotsByHeads, k: SlotsByHeads, v: SlotsByHeads, unused: Tensor, width: int
) -> tuple[Tensors, tuple[int, ...]]:
    """A kernel's arguments for q, k and v: first outputs, tables, slots, scales; and which it has, and the kind of
    slots that they have."""
    kinds = q, k, v
    first = [outputs[0].bits if outputs else unused for outputs in kinds]
    tables = [_table(outputs, width) if outputs else unused for outputs in kinds]
    slots = [outputs[0].slots_F if outputs else None for outputs in kinds]
    present = [int(bool(outputs)) for outputs in kinds] + [_kind_of_slots(outputs) for outputs in kinds]
    scale_tables = [_scale_table(outputs) for outputs in (k, v)]
    found = *first, *tables, *[unused if x is None else x for x in slots], *_scales(k, v), *scale_tables
    return found, tuple(present)


def _scales(k: SlotsByHeads, v: SlotsByHeads) -> Tensors:
    """The first scales of k and of v."""
    return k[0].scales if k else None, v[0].scales if v else None


def _kind_of_slots(outputs: SlotsByHeads) -> int:
    """`NO_SLOTS`, `ONE_RING` or `RINGS`."""
    if not outputs or outputs[0].slots_F is None:
        return 0
    return 1 if len({_place(out.slots_F) for out in outputs if out.slots_F is not None}) == 1 else 2


def _place(slots_F: Tensor) -> tuple[int, int]:
    """Where slots lie: their memory, and how many numbers after its begin."""
    return slots_F.untyped_storage().data_ptr(), int(slots_F.storage_offset())


def _table(outputs: Sequence[Slots], width: int) -> Tensor:
    """A line for every head: its first row, counted from the first output, and the steps of batch, frame and token. If
    heads are in several rings, the row of each head's slots follows, counted from those of the first output."""
    return _lines([slots.x for slots in outputs], width, torch.int32, _rings(outputs))


def _scale_table(outputs: Sequence[Slots]) -> Tensor | None:
    """The same of the scales, of which each is a row."""
    scales = [slots.scales.unsqueeze(-1) for slots in outputs if slots.scales is not None]
    return _lines(scales, 1, torch.int64, _rings(outputs)) if scales else None


def _lines(outputs: Sequence[Tensor], width: int, dtype: torch.dtype, rings: tuple[int, ...]) -> Tensor:
    first = outputs[0]
    begin = first.data_ptr() if len(outputs) > 1 else 0
    parts = tuple((x.data_ptr() - begin if begin else 0, x.shape[3], x.stride()) for x in outputs)
    return _table_of(parts, width, first.element_size(), first.device, dtype, rings)


def _rings(outputs: Sequence[Slots]) -> tuple[int, ...]:
    """The row of each output's slots in a tensor (R, F), counted from that of the first output; nothing for one ring.

    Raises:
        ValueError: the slots of several rings lie in tensors of their own.
    """
    first = outputs[0].slots_F
    if _kind_of_slots(outputs) != 2 or first is None:
        return ()
    (memory, origin), rings = _place(first), []
    for other, begin in (_place(out.slots_F) for out in outputs if out.slots_F is not None):
        row, rest = divmod(begin - origin, max(1, len(first)))
        if rest or memory != other:
            raise ValueError("slots_F: expected rows of one tensor in Slots of several rings, not separate tensors")
        rings.append(row)
    return tuple(rings)


@cache
def _table_of(
    outputs: tuple[tuple[int, int, tuple[int, ...]], ...],
    width: int,
    itemsize: int,
    device: torch.device,
    dtype: torch.dtype,
    rings: tuple[int, ...],
) -> Tensor:
    """The table of `_table`, from each output's distance from the first in bytes, its heads, strides and row of slots;
    with the rows if there are several rings."""
    lines: list[tuple[int, ...]] = []
    rows: list[int] = []
    for number, (distance, heads, strides) in enumerate(outputs):
        steps = [distance // itemsize, *strides[:4]]
        if distance % itemsize or any(step % width for step in steps):
            raise ValueError(
                f"outputs[{number}]: expected a distance from the first output and strides that the head width {width} "
                f"divides, as in one buffer, not {steps}"
            )
        begin, by_batch, by_frame, by_token, by_head = (step // width for step in steps)
        lines += [(begin + head * by_head, by_batch, by_frame, by_token) for head in range(heads)]
        rows += [rings[number]] * heads if rings else []
    if not rings:
        return on_device(tuple(lines), device, dtype)
    return on_device((tuple(chain(*lines, rows)),), device, dtype)


def _offsets(pieces: Sequence[Tensor]) -> Tensor:
    """A line for every token of a frame: its first row, counted from the first piece, and the step of a frame."""
    first, width = pieces[0], pieces[0].shape[5]
    lines = []
    for number, piece in enumerate(pieces):
        distance = (piece.data_ptr() - first.data_ptr()) // first.element_size()
        by_token = piece.stride(3) if piece.shape[3] > 1 else 0
        by_frame = piece.stride(2) if piece.shape[2] > 1 else piece.stride(1)
        spacing = piece.shape[2] == 1 or piece.stride(1) == first.stride(1) // first.stride(2) * by_frame
        if (
            any(step % width for step in (distance, by_token, by_frame))
            or not spacing
            or piece.stride(0) != piece.shape[1] * piece.stride(1)
        ):
            raise ValueError(f"pieces[{number}]: expected whole frames of one buffer, not strides {piece.stride()}")
        lines.append((distance // width, by_token // width, piece.shape[3], by_frame // width))
    return _token_by_token(tuple(lines), first.device)


@cache
def _token_by_token(pieces: Lines, device: torch.device) -> Tensor:
    """The table of `_offsets` on the device, from a line for every piece."""
    lines = [(begin + token * step, by_frame) for begin, step, count, by_frame in pieces for token in range(count)]
    return on_device(tuple(lines), device, torch.int32)
