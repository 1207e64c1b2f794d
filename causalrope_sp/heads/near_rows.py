"""Which tokens of a frame a head with bands of rows sees, cut to the queries and keys of a rank.

See `HeadPolicy` for the bands. As in sliding tile attention (arXiv 2502.04507), all queries of a band see the same
keys, so that a kernel computes no product that it would mask.
"""

from __future__ import annotations

from functools import cache

from causalrope_kernels import Bands
from causalrope_sp.grid import LatentGrid

Span = tuple[int, int]  # tokens of a frame, as [first, stop)


def sees_all(rows: int, near: int | None) -> bool:
    """Returns whether a head sees whole frames.

    Args:
        rows: the rows of tokens of a frame.
        near: the rows of a band; None for whole frames.
    """
    return near is None or 2 * near >= rows


@cache
def bands_of(grid: LatentGrid, near: int, queries: Span, keys: Span) -> Bands:
    """Returns what the queries of a frame on a rank see of its keys.

    Args:
        grid: the latent frame in tokens.
        near: the rows of a band.
        queries: the tokens of the queries.
        keys: the tokens of the keys, which are those of a slot.
    """
    height, found = near * grid.columns, []
    for first in range(0, grid.tokens, height):
        own = _common((first, first + height), queries)
        if own[0] < own[1]:
            found.append((own, _common((first - height, first + 2 * height), keys)))
    own_first, key_first = queries[0], keys[0]
    return Bands(
        tuple((first - own_first, stop - own_first) for (first, stop), _ in found),
        tuple((first - key_first, stop - key_first) for _, (first, stop) in found),
        keys[1] - keys[0],
    )


def _common(a: Span, b: Span) -> Span:
    """The tokens that are in both; [first, first) within `b` if there are none."""
    first = min(max(a[0], b[0]), b[1])
    return first, max(first, min(a[1], b[1]))


@cache
def pairs(grid: LatentGrid, near: int | None, queries: Span, keys: Span) -> int:
    """Returns how many pairs of a query and a key that it sees a frame of queries and one of keys have; see `bands_of`.

    Args:
        grid: the latent frame in tokens.
        near: the rows of a band; None for whole frames.
        queries: the tokens of the queries.
        keys: the tokens of the keys.
    """
    if near is None:
        return (queries[1] - queries[0]) * (keys[1] - keys[0])
    bands = bands_of(grid, near, queries, keys)
    return sum((b - a) * (d - c) for (a, b), (c, d) in zip(bands.queries, bands.keys, strict=True))


def row_pairs(rows: int, near: int | None) -> int:
    """Returns the pairs of a row of queries and a row of keys that it sees, of a frame of `rows` rows."""
    return pairs(LatentGrid(rows, 1), near, (0, rows), (0, rows))
