"""The pieces of a collective whose keys and values travel as a quantized cache stores them.

A piece is a row of numbers in the dtype of the queries. It holds q, if that travels too, then the bytes of k and v in 8
bits, then those of their scales, and is padded to whole heads.

Shapes: N kinds (3 for q, k, v and 2 for k, v), B batch, F frames of the pass, s tokens of a frame, h heads, d head
width.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from causalrope_kernels import QuantizedPieces, Slots
from causalrope_kernels.quantized_heads import SCALE_DTYPE

Sizes = tuple[int, int, int, int, int, int]  # (N, B, F, s, h, d) of a piece
SlotsOfPieces = tuple[list[Slots], list[Slots], list[Slots]]  # of q, of k and of v, one of each piece


def kv_elements(vectors: int, width: int, itemsize: int) -> int:
    """Returns how many numbers of the dtype of the queries hold keys and values in 8 bits, with their scales.

    Args:
        vectors: the keys, one for every token and head; there are as many values.
        width: d.
        itemsize: the bytes of a number in the dtype of the queries.
    """
    stored = 2 * vectors * (width + SCALE_DTYPE.itemsize)
    return width * -(-stored // (width * itemsize))


def piece_shapes(sizes: Sequence[Sizes], like: Tensor) -> list[tuple[int]]:
    """Returns the shapes of pieces of these sizes; `like` has the dtype of the queries."""
    itemsize = like.element_size()
    return [(_of_q(size) + kv_elements(prod(size[1:5]), size[5], itemsize),) for size in sizes]


def unpack(pieces: Sequence[Tensor], sizes: Sequence[Sizes], dtype: torch.dtype) -> QuantizedPieces:
    """Returns views of what lies in pieces.

    Args:
        pieces: the pieces, in the dtype of the queries.
        sizes: those of each piece.
        dtype: of k and v, int8 or float8_e4m3fn.
    """
    q, numbers, scales = list[Tensor](), list[Tensor](), list[Tensor]()
    for piece, size in zip(pieces, sizes, strict=True):
        of_q, vectors = _of_q(size), 2 * prod(size[1:5])
        if of_q:
            q.append(piece[:of_q].view(size[1:]))
        stored, of_numbers = piece[of_q:].view(torch.int8), vectors * size[5]
        numbers.append(stored[:of_numbers].view(dtype).view(2, *size[1:]))
        of_scales = stored[of_numbers : of_numbers + vectors * SCALE_DTYPE.itemsize]
        scales.append(of_scales.view(SCALE_DTYPE).view(2, *size[1:5]))
    return QuantizedPieces(q, numbers, scales)


def slots_of(pieces: QuantizedPieces) -> SlotsOfPieces:
    """Returns the slots of q, of k and of v in pieces that are going to be sent, one of each piece."""
    both = list(zip(pieces.numbers, pieces.scales, strict=True))
    k, v = ([Slots(numbers[kind], scales=scales[kind]) for numbers, scales in both] for kind in range(2))
    return [Slots(q) for q in pieces.q], k, v


class KeptPieces:
    """Views of the pieces of a stream's buffers. All layers share a buffer, so they are made once for each of its uses
    and sizes."""

    def __init__(self) -> None:
        # by use: the address of the buffer, and its views by their dtype and sizes
        self._kept: dict[str, tuple[int, dict[tuple[object, ...], tuple[QuantizedPieces, SlotsOfPieces]]]] = {}

    def sent(self, use: str, pieces: Sequence[Tensor], sizes: Sequence[Sizes], dtype: torch.dtype) -> SlotsOfPieces:
        """Returns `slots_of` the pieces of a send buffer.

        Args:
            use: the name of the buffer.
            pieces: see `unpack`.
            sizes: see `unpack`.
            dtype: see `unpack`.
        """
        return self._views(use, pieces, sizes, dtype)[1]

    def received(
        self, use: str, pieces: Sequence[Tensor], sizes: Sequence[Sizes], dtype: torch.dtype
    ) -> QuantizedPieces:
        """Returns `unpack` of the pieces of a receive buffer; see `sent`."""
        return self._views(use, pieces, sizes, dtype)[0]

    def _views(
        self, use: str, pieces: Sequence[Tensor], sizes: Sequence[Sizes], dtype: torch.dtype
    ) -> tuple[QuantizedPieces, SlotsOfPieces]:
        memory, key = pieces[0].untyped_storage().data_ptr(), (dtype, *sizes)
        known = self._kept.get(use)
        if known is None or known[0] != memory:  # a buffer that grew is another one
            known = self._kept[use] = memory, {}
        views = known[1].get(key)
        if views is None:
            unpacked = unpack(pieces, sizes, dtype)
            views = known[1][key] = unpacked, slots_of(unpacked)
        return views


def _of_q(size: Sizes) -> int:
    """How many numbers of a piece are those of q."""
    return prod(size[1:]) if size[0] == 3 else 0
