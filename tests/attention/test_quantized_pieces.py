"""Views of buffers whose keys and values travel in 8 bits are made once, and anew for what is another buffer."""

from __future__ import annotations

from itertools import chain

import torch
from torch import Tensor

from causalrope_sp.attention.quantized_pieces import KeptPieces, Sizes, piece_shapes

LIKE = torch.zeros(1)


def pieces_of(buffer: Tensor, sizes: list[Sizes]) -> list[Tensor]:
    counts = [count for (count,) in piece_shapes(sizes, LIKE)]
    return list(buffer[: sum(counts)].split(counts))


def test_views_are_kept_of_a_buffer_and_not_of_one_that_replaced_it() -> None:
    """The first piece has no heads, and hence no address."""
    kept, first, second = KeptPieces(), torch.zeros(2000), torch.zeros(2000)
    one: list[Sizes] = [(3, 1, 2, 3, 0, 8), (3, 1, 2, 3, 2, 8)]
    two: list[Sizes] = [(3, 1, 2, 3, 1, 8), (3, 1, 2, 3, 2, 8)]
    found = []
    for buffer in (first, second):
        for sizes in (one, two):
            for dtype in (torch.int8, torch.float8_e4m3fn):
                views = kept.received("in", pieces_of(buffer, sizes), sizes, dtype)
                assert kept.received("in", pieces_of(buffer, sizes), sizes, dtype) is views
                assert [tuple(x.shape) for x in views.numbers] == [(2, *size[1:]) for size in sizes]
                for x in chain(views.q, views.numbers, views.scales):
                    assert x.untyped_storage().data_ptr() == buffer.data_ptr()
                found.append(views)
    assert len(set(map(id, found))) == 8
    slots = kept.sent("out", pieces_of(first, two), two, torch.int8)
    assert kept.sent("out", pieces_of(first, two), two, torch.int8) is slots
    for kind in slots:
        for each in kind:
            each.x.fill_(1)
    assert kept.received("in", pieces_of(first, two), two, torch.int8).numbers[1].eq(1).all()
