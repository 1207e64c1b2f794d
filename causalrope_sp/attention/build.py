"""Builds a rank's attention strategy from the layout that was chosen."""

from __future__ import annotations

from causalrope_kernels import Bands
from causalrope_sp.attention.base import Strategy
from causalrope_sp.attention.gather_kv import GatherKV
from causalrope_sp.attention.shard_kv import ShardKV
from causalrope_sp.attention.ulysses import Ulysses
from causalrope_sp.distributed import SequenceParallel
from causalrope_sp.distributed.layout import Layout, token_spans
from causalrope_sp.grid import LatentGrid
from causalrope_sp.heads.near_rows import bands_of
from causalrope_sp.heads.rings import HeadRings


def build_strategy(parallel: SequenceParallel, layout: Layout, grid: LatentGrid, rings: HeadRings) -> Strategy:
    """Builds this rank's strategy. Every rank must call it, since it makes process groups.

    Args:
        parallel: the ranks, with the options of attention.
        layout: how the ranks of the `sp` axis share the work (see `planning.strategy.choose_strategy`).
        grid: the latent frame in tokens.
        rings: the rings and the placement of the model's heads, for the columns of the layout.

    Returns:
        The strategy, which holds the communicators that it needs.

    Raises:
        ConfigError: the `sp` axis has more ranks than a frame has tokens.
    """
    strategy = _strategy(parallel, layout, grid, rings)
    if not rings.one:
        _, column = layout.coordinates(parallel.sp_rank)
        from_model = layout.ulysses == 1 and layout.inner != GatherKV.name
        bands = _bands(rings, layout, grid, parallel.sp_rank)
        strategy.cached = rings.cached(column, from_model=from_model, bands=bands)
    return strategy


def _bands(rings: HeadRings, layout: Layout, grid: LatentGrid, rank: int) -> tuple[tuple[Bands | None, ...], ...]:
    """What queries see of every frame on a rank; see `CachedHeads`."""
    if not any(rings.rows):
        return ()
    queries, keys = token_spans(layout, grid, rank)
    readers = [queries]
    if layout.inner == ShardKV.name:
        readers = [token_spans(layout, grid, row * layout.ulysses)[1] for row in range(layout.sharing)]
    return tuple(tuple(None if n is None else bands_of(grid, n, of, keys) for n in rings.rows) for of in readers)


def _strategy(parallel: SequenceParallel, layout: Layout, grid: LatentGrid, rings: HeadRings) -> Strategy:
    order = () if rings.one else rings.placements
    if parallel.mesh.sp == 1:
        return Strategy(grid.tokens, sum(rings.placements[0].sizes), parallel.attention, order)
    group = parallel.mesh.sp_group(parallel.rank)
    tokens = [shard.tokens for shard in parallel.shard(grid).all]
    row, column = layout.coordinates(parallel.sp_rank)
    rows, heads = layout.rows(tokens), rings.placements[0].sizes[column]
    order = order if layout.ulysses == 1 else ()
    inner = Strategy(sum(rows[row]), heads, parallel.attention, order)
    if layout.inner is not None:
        strategy = {GatherKV.name: GatherKV, ShardKV.name: ShardKV}[layout.inner]
        communicator = parallel.communicator_among(group[column :: layout.ulysses])
        assert communicator is not None, "an inner strategy needs several ranks"
        shared = [sum(each) for each in rows]
        inner = strategy(communicator, shared, heads, parallel.overlap, parallel.attention, order)
    if layout.ulysses == 1:
        return inner
    communicator = parallel.communicator_among(group[row * layout.ulysses : (row + 1) * layout.ulysses])
    assert communicator is not None, "ulysses needs several ranks"
    return Ulysses(communicator, rows[row], rings.placements, inner, head_groups(parallel, layout))


def stored_part(layout: Layout, grid: LatentGrid, rank: int) -> tuple[slice, int]:
    """Returns which keys and values a rank caches, of every frame.

    Args:
        layout: how the ranks of the `sp` axis share the work.
        grid: the latent frame in tokens.
        rank: its number on the `sp` axis.

    Returns:
        The tokens of a frame, and the number of the column whose heads they are of (see `HeadPlacement`).
    """
    _, keys = token_spans(layout, grid, rank)
    return slice(*keys), layout.coordinates(rank)[1]


def describe_strategy(parallel: SequenceParallel, layout: Layout) -> str:
    """Describes in words what decides the collectives of a stream; the text must be the same on every rank."""
    return f"{parallel.label(layout)}, {head_groups(parallel, layout)} head groups"


def head_groups(parallel: SequenceParallel, layout: Layout) -> int:
    """Returns in how many groups of heads a rank sends its output: 1 unless the strategy is `ulysses`.

    Args:
        parallel: the ranks, with the number of groups that was asked for.
        layout: the layout of the strategy.
    """
    return 1 if layout.inner else parallel.head_groups
