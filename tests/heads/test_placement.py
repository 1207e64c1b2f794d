"""Where heads are placed: by longest processing time, whole, and in the order that slots and outputs need."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from causalrope_kernels import Slots
from causalrope_sp import LatentGrid, SamplerConfig, StreamConfig
from causalrope_sp.config import PRESETS
from causalrope_sp.distributed.layout import parse_strategy, strategies
from causalrope_sp.heads import HeadPolicy
from causalrope_sp.heads.placement import HeadPlacement
from causalrope_sp.heads.rings import HeadRings
from causalrope_sp.planning.counts import attention_flops, cache_bytes, head_imbalance
from causalrope_sp.planning.workload import Workload
from tests.support.strategy_runs import CONFIG, WORK

# how many of the 12 heads of each of Self-Forcing's layers Forcing-KV (arXiv 2605.09681) calls static: 134 of 360
STATIC = (5, 4, 5, 4, 3, 8, 4, 6, 8, 4, 3, 4, 8, 1, 6, 1, 3, 8, 1, 4, 8, 6, 1, 3, 1, 2, 5, 6, 6, 6)


def published_split(heads: int, static: int) -> HeadPolicy:
    """That split, scaled to another number of heads; layer 0 is whole."""
    counts = [0, *(round(count * heads / 12) for count in STATIC[1:])]
    return HeadPolicy(tuple((static,) * count + (None,) * (heads - count) for count in counts))


@st.composite
def policies(draw: st.DrawFn) -> tuple[HeadPolicy, int, int]:
    layers, heads = draw(st.integers(1, 3)), draw(st.integers(1, 9))
    window = st.none() | st.sampled_from([0, 3, 4, 9])
    policy = HeadPolicy(tuple(tuple(draw(window) for _ in range(heads)) for _ in range(layers)))
    return policy, draw(st.integers(1, heads)), heads


@given(policies(), st.none() | st.integers(3, 8))
@settings(deadline=None)
def test_every_head_has_one_place_with_those_of_its_ring(
    drawn: tuple[HeadPolicy, int, int], similar: int | None
) -> None:
    policy, columns, heads = drawn
    rings = HeadRings.of(policy, len(policy.windows), heads, columns, 8, 1, 2, similar)
    seen = policy.frames(8)
    assert rings.frames == tuple(sorted({frames for layer in seen for frames in layer}, reverse=True))
    for layer, placement, counts in zip(seen, rings.placements, rings.heads):
        assert sorted(placement.order) == list(range(heads))
        assert all(placement.columns)
        for column, by_ring in zip(placement.columns, counts):
            held = [layer[head] for head in column]
            assert held == sorted(held, reverse=True)
            assert [held.count(frames) for frames in rings.frames] == list(by_ring)
    loads = [rings.attended(column, 8) for column in range(columns)]
    assert sum(loads) == sum(map(sum, seen))
    most = sum(
        max(sum(layer[head] for head in column) for column in at.columns) for layer, at in zip(seen, rings.placements)
    )
    assert rings.waited_for(8) == most
    assert rings.imbalance({(8,): 1}) == pytest.approx(most * columns / sum(loads) if sum(loads) else 1)


@given(policies(), st.integers(3, 8), st.integers(1, 4))
@settings(deadline=None)
def test_columns_wait_in_every_layer_of_every_forward(
    drawn: tuple[HeadPolicy, int, int], similar: int, steps: int
) -> None:
    """A chunk's first forward has a part that attends all frames, and the context pass of the chunk before."""
    policy, columns, heads = drawn
    work = replace(WORK, config=replace(CONFIG, num_layers=len(policy.windows), num_heads=heads, dim=6 * heads))
    work = replace(work, grid=LatentGrid(3, 4), window=8, sink=1, heads=policy, similar=similar, steps=steps)
    waited = every = 0
    for layer, placement in zip(policy.frames(8), work.head_rings(columns).placements):
        for parts in ((8, similar), *[(similar,)] * (steps - 1)):
            loads = [
                sum(whole if layer[head] == 8 else layer[head] for whole in parts for head in column)
                for column in placement.columns
            ]
            waited, every = waited + max(loads), every + sum(loads)
    found = head_imbalance(parse_strategy("ulysses", columns), work)
    assert found == pytest.approx(waited * columns / every if every else 1)


@given(policies(), st.data())
@settings(deadline=None)
def test_slots_and_outputs_change_their_order_and_come_back(
    drawn: tuple[HeadPolicy, int, int], data: st.DataObject
) -> None:
    """What is written head by head to slots that are cut anywhere comes back in the model's order."""
    policy, columns, heads = drawn
    placement = HeadRings.of(policy, len(policy.windows), heads, columns, 8, 1, 2).placements[-1]
    cuts = sorted(data.draw(st.sets(st.integers(1, heads - 1)))) if heads > 1 else []
    x = torch.zeros(1, 2, 3, heads, 2)
    parts = [x[:, :, :, a:b] for a, b in zip([0, *cuts], [*cuts, heads])]
    by_head = placement.by_head([Slots(part, None, part) for part in parts])
    values = torch.randn(1, 2, 3, heads, 2)
    for slots, value in zip(by_head, values.split([slots.x.shape[3] for slots in by_head], 3), strict=True):
        assert slots.memory is not None
        slots.memory.copy_(value)
        assert slots.x.data_ptr() == slots.memory.data_ptr()
    assert torch.equal(x, values[:, :, :, list(placement.order)])
    assert torch.equal(placement.in_model_order(x, 3), values)


def test_heads_that_all_see_the_whole_window_stay_where_they_are() -> None:
    dense = HeadRings.of(None, 2, 7, 3, 8)
    assert dense.one
    assert dense.imbalance({(8,): 1}) == 9 / 7
    assert HeadRings.of(HeadPolicy(((None, 9, 8, None, 8, 12, 8),) * 2), 2, 7, 3, 8, 1, 2) == dense
    assert HeadPlacement(()).in_order
    assert not HeadRings.of(HeadPolicy(((4,) * 7,) * 2), 2, 7, 1, 8, 1, 2).one


def test_the_published_split_is_balanced_on_eight_ranks() -> None:
    """40 heads; a static head sees sink 1, the newest frame and a chunk of 3, of a window of 21."""
    rings = HeadRings.of(published_split(40, static=5), 30, 40, 8, 21, 1, 3)
    assert rings.imbalance({(21,): 1}) <= 1.05
    both = HeadRings.of(published_split(40, static=5), 30, 40, 8, 21, 1, 3, similar=11)
    assert both.imbalance({(21, 11): 1, (11,): 3}) <= 1.05
    loads = [rings.attended(column, 21) for column in range(8)]
    assert max(loads) * 8 / sum(loads) < 1.2, "even without waiting at every layer"


def test_forcing_kv_and_a_cache_in_8_bits_save_what_is_promised() -> None:
    """Wan 2.1 1.3B at 480×832 on 8 ranks. Dynamic heads see as many frames as Forcing-KV's: the sink, the newest frame,
    the chunk, and a third of the others."""
    first, *others = published_split(12, static=5).windows
    policy = HeadPolicy((first, *(tuple(window or 11 for window in layer) for layer in others)))
    dense, sparse = (
        Workload.of(PRESETS["wan2.1-1.3b"], LatentGrid(30, 52), stream, SamplerConfig(), 21)
        for stream in (StreamConfig(21, 1, 3), StreamConfig(21, 1, 3, cache="int8", heads=policy))
    )
    for strategy in strategies(8, 12):
        layout = parse_strategy(strategy, 8)
        flops, cache = (
            [max(count(layout, work, rank) for rank in range(8)) for work in (dense, sparse)]
            for count in (partial(attention_flops, frames=3, keys=21), cache_bytes)
        )
        assert flops[1] <= 0.45 * flops[0], strategy
        assert cache[1] <= 0.27 * cache[0], strategy
