"""The host side of the kernels that write q, k, v to their slots and tokens to send buffers: tables and launches.

Shapes: B batch, F frames, s tokens of a frame, S tokens of a whole frame, H heads, d head width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cache
from itertools import chain

import torch
from torch import Tensor

from causalrope_kernels.add_norm_kernel import warps_of
from causalrope_kernels.arguments import Pieces, Projection, QuantizedPieces, Slots, SlotsByHeads, Source
from causalrope_kernels.launch import Kernel, padded
from causalrope_kernels.norm_rope_store_kernel import (
    pieces_kernel,
    projection_kernel,
    split_kernel,
)
from causalrope_kernels.quantized_heads import as_bits
from causalrope_kernels.tables import is_aligned, on_device

Tensors = tuple[Tensor | None, ...]
PROJECTION, PIECES, SPLIT = Kernel(projection_kernel), Kernel(pieces_kernel), Kernel(split_kernel)


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
    key = projection.heads, projection.eps, rotation.sizes, rotation.kinds, own, offset, *layouts
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
    pieces, first_key = _filled(source.pieces if isinstance(source, Pieces) else source.numbers), 0
    if not pieces or not (q or k or v):
        return
    first, offsets = as_bits(pieces[0]), _offsets(pieces)
    if isinstance(source, Pieces):
        first_key = len(first) - 2
        inputs: Tensors = first, offsets, first, offsets, None, None
    else:
        queries, scales = _filled(source.q), _filled(source.scales)
        q_inputs = (queries[0], _offsets(queries, kinds=False)) if queries else (first, offsets)  # these are not read
        inputs = *q_inputs, first, offsets, scales[0], _offsets(scales, width=1)
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
        offsets = _offsets(pieces, kinds=False)
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


def _offsets(pieces: Sequence[Tensor], *, kinds: bool = True, width: int | None = None) -> Tensor:
    """A line for every token of a frame: its first row, counted from the first piece, and the step of a frame.

    Args:
        pieces: tensors (N, B, F, s, H, d), or (N, B, F, s, H) with a width of 1.
        kinds: whether they have the axis N.
        width: d; None for the size of the last axis.
    """
    first = pieces[0]
    begin = first.data_ptr()
    parts = tuple([(piece.data_ptr() - begin, piece.shape, piece.stride()) for piece in pieces])
    return _offsets_of(parts, kinds, width or first.shape[-1], first.element_size(), first.device)


@cache
def _offsets_of(
    pieces: tuple[tuple[int, torch.Size, tuple[int, ...]], ...],
    kinds: bool,
    width: int,
    itemsize: int,
    device: torch.device,
) -> Tensor:
    """The table of `_offsets`, from each piece's distance from the first in bytes, its shape and strides."""
    _, _, of_first = pieces[0]
    lines: list[tuple[int, int]] = []
    for number, (distance, shape, strides) in enumerate(pieces):
        (batch, frames, tokens), (by_batch, by_frame, by_token) = shape[kinds:][:3], strides[kinds:][:3]
        begin, by_token = distance // itemsize, by_token if tokens > 1 else 0
        by_frame = by_frame if frames > 1 else by_batch
        apart = frames > 1 and by_batch != of_first[kinds] // of_first[kinds + 1] * by_frame
        apart = apart or (kinds and strides[0] != batch * by_batch)
        if apart or any(step % width for step in (begin, by_token, by_frame)):
            raise ValueError(f"pieces[{number}]: expected whole frames of one buffer, not strides {strides}")
        lines += [((begin + token * by_token) // width, by_frame // width) for token in range(tokens)]
    return on_device(tuple(lines), device, torch.int32)
