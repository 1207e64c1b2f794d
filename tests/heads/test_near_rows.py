"""Bands of rows on any grid and ranks, against masks of all pairs of a query and a key."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from causalrope_sp import Chunk, LatentGrid
from causalrope_sp.cache.window import SlidingWindow
from causalrope_sp.distributed import SequenceParallel, strategies
from causalrope_sp.distributed.layout import parse_strategy, token_spans
from causalrope_sp.grid import Shard
from causalrope_sp.heads import HeadPolicy
from causalrope_sp.heads.near_rows import bands_of, pairs
from causalrope_sp.heads.rings import HeadRings
from causalrope_sp.planning.counts import attention_flops, cache_bytes, cross_flops, head_imbalance
from causalrope_sp.sampling.pass_inputs import Part
from causalrope_sp.sampling.stream import CausalStream
from tests.support.strategy_runs import CONFIG, NEAR, WORK, make_model, random
from tests.support.streams import strategy_of

WINDOW, SINK, CHUNK = 6, 1, 2


def mask(grid: LatentGrid, near: int | None) -> Tensor:
    """Which tokens of a frame see which: those of their band and of the next ones."""
    bands = torch.arange(grid.tokens) // grid.columns // (near or grid.rows)
    return (bands[:, None] - bands).abs() <= 1


spans = st.tuples(st.integers(0, 30), st.integers(0, 30)).map(sorted).map(tuple)


@given(st.integers(1, 7), st.integers(1, 4), st.integers(1, 8), spans, spans)
@settings(deadline=None)
def test_bands_are_those_of_the_mask(
    rows: int, columns: int, near: int, queries: tuple[int, int], keys: tuple[int, int]
) -> None:
    grid = LatentGrid(rows, columns)
    (a, b), (c, d) = ((min(first, grid.tokens - 1), min(stop, grid.tokens)) for first, stop in (queries, keys))
    whole, (b, d) = mask(grid, near), (max(a + 1, b), max(c + 1, d))
    bands, found = bands_of(grid, near, (a, b), (c, d)), torch.zeros(b - a, d - c, dtype=torch.bool)
    for (first, stop), (seen, seen_stop) in zip(bands.queries, bands.keys, strict=True):
        found[first:stop, seen:seen_stop] = True
    assert torch.equal(found, whole[a:b, c:d])
    assert bands.slot_tokens == d - c
    assert bands.frame_queries == b - a
    assert pairs(grid, near, (a, b), (c, d)) == whole[a:b, c:d].sum()


@st.composite
def policies(draw: st.DrawFn) -> HeadPolicy:
    def table(*values: int | None) -> tuple[tuple[int | None, ...], ...]:
        return tuple(tuple(draw(st.sampled_from(values)) for _ in range(6)) for _ in range(2))

    return HeadPolicy(table(None, 0, 3, 4), table(None, 1, 2))


def loads(policy: HeadPolicy, grid: LatentGrid, strategy: str, ranks: int) -> list[list[int]]:
    """The pairs of a query and a key of each layer and rank, from masks."""
    layout = parse_strategy(strategy, ranks)
    rings = HeadRings.of(policy, 2, 6, layout.ulysses, WINDOW, SINK, CHUNK, frame_rows=grid.rows)
    found: list[list[int]] = []
    for layer, (windows, rows) in enumerate(zip(policy.windows, policy.rows_of_heads, strict=True)):
        found.append([])
        for rank in range(ranks):
            (a, b), (c, d) = token_spans(layout, grid, rank)
            heads: Sequence[int] = rings.placements[layer].columns[layout.coordinates(rank)[1]]
            frames = [WINDOW if windows[head] is None else windows[head] for head in heads]
            each = [f * int(mask(grid, rows[h])[a:b, c:d].sum()) for f, h in zip(frames, heads) if f is not None]
            found[-1].append(sum(each))
    return found


@given(policies(), st.integers(1, 5), st.integers(1, 2), st.data())
@settings(deadline=None, max_examples=50)
def test_flops_and_balance_are_those_of_masks(
    policy: HeadPolicy, ranks: int, columns: int, data: st.DataObject
) -> None:
    """With any strategy all ranks together attend each pair once; ρ is that of the shares of pairs that are seen."""
    strategy = data.draw(st.sampled_from(strategies(ranks, 6)))
    grid, layout = LatentGrid(5, columns), parse_strategy(strategy, ranks)
    work = replace(WORK, grid=grid, window=WINDOW, sink=SINK, chunk_frames=CHUNK, heads=policy)
    by_layer = loads(policy, grid, strategy, ranks)
    pair = 4 * work.batch * work.config.head_dim * CHUNK
    for rank in range(ranks):
        assert attention_flops(layout, work, rank, CHUNK, WINDOW) == pair * sum(layer[rank] for layer in by_layer)
    every = [sum(by_layer[n]) for n in range(2)]
    whole = zip(policy.frames(WINDOW), policy.rows_of_heads, strict=True)
    assert every == [
        sum(f * int(mask(grid, n).sum()) for f, n in zip(frames, rows, strict=True)) for frames, rows in whole
    ]
    sizes = [(b - a) * (d - c) for (a, b), (c, d) in (token_spans(layout, grid, rank) for rank in range(ranks))]
    shares = [[load / size for load, size in zip(layer, sizes, strict=True)] for layer in by_layer]
    if sum(every):
        rho = sum(map(max, shares)) * ranks / sum(map(sum, shares))
        assert head_imbalance(layout, work) == pytest.approx(rho)


def test_torch_counts_the_flops_of_the_formula() -> None:
    """Its counter does not know the kernel for CPUs that returns log-sum-exps."""
    grid = LatentGrid(7, 1)
    work = replace(WORK, grid=grid, window=8, sink=1, heads=NEAR)
    single = SequenceParallel.single(device="cpu")
    embeds, x = random(1, CONFIG.text_len, CONFIG.text_dim), random(1, 2, 7, CONFIG.token_dim)
    stream = CausalStream(make_model(), embeds, grid, SlidingWindow(8, 1), Shard(grid), strategy_of(single, work))
    for n in range(5):
        stream.commit(Part(Chunk(n, 2 * n, 2), x, 0.0))
    assert stream.cache.bytes == cache_bytes(parse_strategy("ulysses", 1), work, 0)
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    known: dict[Any, Any] = {kernel: lambda q, k, v, *rest, **more: sdpa_flop_count(q, k, v)}
    with FlopCounterMode(display=False, custom_mapping=known) as counter:
        stream.denoise(Chunk(5, 10, 2), x, 1000.0)
    found = sum(counter.get_flop_counts()["CausalDiT"].values())
    attention = attention_flops(parse_strategy("ulysses", 1), work, 0, 2, 8)
    assert found == 2 * 7 * work.linear_flops + cross_flops(work, 2 * 7) + attention


def test_heads_with_more_keys_come_first_whatever_they_lack() -> None:
    """20 rows of tokens, bands of 2: a head sees 0.28 of each frame, so 9 of 12 frames are fewer keys than 4 whole."""
    policy = HeadPolicy(((None, 9, 4, 9),), ((None, None, None, 2),))
    rings = HeadRings.of(policy, 1, 4, 2, 12, 0, 1, frame_rows=20)
    assert (rings.frames, rings.rows) == ((12, 9, 4, 9), (None, None, None, 2))
    assert rings.placements[0].columns == ((0, 3), (1, 2)), "12 + 9·0.28 and 9 + 4"


def test_bands_that_show_whole_frames_are_none() -> None:
    """Of 5 rows 3 and 2 are two bands, which see each other; the run is that of a stream without rows."""
    windows = HeadPolicy(((None, 3, 4),))
    given_rows = replace(windows, rows=((9, 3, None),))
    assert HeadRings.of(given_rows, 1, 3, 2, 6, 1, 2, frame_rows=5) == HeadRings.of(windows, 1, 3, 2, 6, 1, 2)
    assert HeadRings.of(HeadPolicy(((None,) * 3,), ((3, 4, 5),)), 1, 3, 2, 6, 1, 2, frame_rows=5) == HeadRings.of(
        None, 1, 3, 2, 6
    )
    with pytest.raises(ValueError, match="frame_rows: expected the rows of tokens of a frame"):
        HeadRings.of(given_rows, 1, 3, 2, 6, 1, 2)
