"""Real processes against one: what each rank ends up with, what it sends, and what it refuses."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from causalrope_sp import Chunk, LatentGrid, StreamConfig
from causalrope_sp.attention.base import Strategy
from causalrope_sp.cache.window import SlidingWindow
from causalrope_sp.config import PRESETS, CacheDtype
from causalrope_sp.distributed import SequenceParallel, strategies
from causalrope_sp.distributed.launch import RankPool
from causalrope_sp.distributed.layout import parse_strategy
from causalrope_sp.grid import Shard
from causalrope_sp.heads import HeadPolicy
from causalrope_sp.planning.counts import cache_bytes, received, received_latents
from causalrope_sp.planning.workload import Workload
from causalrope_sp.sampling.pass_inputs import Part
from causalrope_sp.sampling.stream import CausalStream
from tests.support.strategy_runs import CONFIG, JOBS, WORK, Job, exercise, make_model, random, relative, runs, single

COLLECTIVES = {"ulysses": 2, "gather-kv": 1, "shard-kv": 2}  # a layer, in a pass; a product makes those of its parts
RANKS = (2, 3, 4, 5, 6)  # at 6 the two sides of a product differ
EVERY = [(ranks, strategy) for ranks in RANKS for strategy in strategies(ranks, CONFIG.num_heads)]


@pytest.fixture(scope="module")
def found(pool: RankPool) -> Callable[[int], list[dict[Any, Any]]]:
    """What `exercise` found at a number of ranks, rank by rank; done once."""

    @functools.cache
    def run(ranks: int) -> list[dict[Any, Any]]:
        found: list[dict[Any, Any]] = pool.run(exercise, ranks)
        return found

    return run


Found = Callable[[int], list[dict[Any, Any]]]


@pytest.fixture(scope="module")
def alone() -> dict[str, Tensor]:
    return {name: single(job) for name, job in JOBS.items()}


@pytest.mark.parametrize(
    ("ranks", "strategy", "name"),
    [(*each, name) for each in EVERY for name, job in JOBS.items() if job.dtype == torch.float64 and runs(*each, name)],
)
def test_many_ranks_equal_one(found: Found, alone: dict[str, Tensor], ranks: int, strategy: str, name: str) -> None:
    results = found(ranks)
    assert len(results) == ranks
    for rank in results:
        assert rank[strategy, name].shape == alone[name].shape
        assert relative(rank[strategy, name], alone[name]) < 1e-12
        assert torch.equal(rank[strategy, name], results[0][strategy, name])


def test_heads_that_see_alike_equal_a_smaller_window(alone: dict[str, Tensor]) -> None:
    job = JOBS["heads that see alike"]
    narrow = single(replace(job, stream=StreamConfig(4, 1, 2)))
    assert relative(alone["heads that see alike"], narrow) < 1e-12
    assert relative(narrow, single(replace(job, stream=StreamConfig(7, 1, 2)))) > 1e-3


@pytest.mark.parametrize(("ranks", "strategy"), EVERY)
def test_overlap_and_head_groups_change_nothing(
    found: Found, alone: dict[str, Tensor], ranks: int, strategy: str
) -> None:
    for rank in found(ranks):
        for result in rank[strategy, "variants"]:
            assert relative(result, alone["window and sink, batch 2"]) < 1e-12


@pytest.mark.parametrize(("ranks", "strategy"), EVERY)
def test_ranks_compute_while_numbers_are_in_flight(found: Found, ranks: int, strategy: str) -> None:
    events = " ".join(found(ranks)[0][strategy, "events"])
    if strategy == "ulysses" and ranks <= CONFIG.num_heads // 2:
        assert events == "send wait attend send attend send wait wait"
    elif strategy == "ulysses":  # some rank has but one head
        assert events == "send wait attend send wait"
    elif strategy == "gather-kv":
        assert events == "send attend wait attend"
    elif strategy == "shard-kv":
        assert events == "send attend wait " + "attend " * (ranks - 1) + "send wait"
    else:
        inner = "send attend wait attend" if "gather" in strategy else "send attend wait attend(?: attend)* send wait"
        assert re.fullmatch(f"send wait {inner} send wait", events)


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_cancelled_chunk_leaves_no_trace_in_any_head_group(found: Found, ranks: int) -> None:
    alone = CausalStream(
        make_model(), random(1, 3, 8), WORK.grid, SlidingWindow(3), Shard(WORK.grid), Strategy(WORK.grid.tokens, 6)
    )
    x = random(4, 1, 2, WORK.grid.tokens, CONFIG.token_dim)
    for n in range(2):
        alone.commit(Part(Chunk(n, 2 * n, 2), x[n], 0.0))
    expected = alone.denoise(Chunk(2, 4, 1), x[3][:, :1], 1000.0)
    for rank in found(ranks):
        assert relative(rank["cancelled"], expected) < 1e-12


@pytest.mark.parametrize(("ranks", "strategy"), EVERY)
def test_narrow_numbers_cost_no_more_on_many_ranks(
    found: Found, alone: dict[str, Tensor], ranks: int, strategy: str
) -> None:
    exact = single(replace(JOBS["bfloat16"], dtype=torch.float64))
    for rank in found(ranks):
        assert relative(rank[strategy, "float32"], alone["float32"]) < 1e-5
        assert relative(rank[strategy, "bfloat16"], exact) < 2 * relative(alone["bfloat16"], exact)


@pytest.mark.parametrize(("ranks", "strategy"), EVERY)
def test_collectives_of_a_layer_in_a_pass(found: Found, ranks: int, strategy: str) -> None:
    parts = [re.sub(r"\d+$", "", part) for part in strategy.split("x")]
    expected = CONFIG.num_layers * sum(COLLECTIVES[part] for part in parts)
    for rank in found(ranks):
        for name in ("denoise", "fused", "context"):
            noted = rank[strategy, "collectives"][name]
            assert len(noted["seen"]) == expected
            assert sum(calls for calls, _, _ in noted["comm_stats"].values()) == expected
            assert noted["layers"] == set(range(CONFIG.num_layers))
        assert len(rank[strategy, "collectives"]["latents"]["seen"]) == 1


@pytest.mark.parametrize(("ranks", "strategy"), EVERY)
def test_buffers_are_allocated_once(found: Found, ranks: int, strategy: str) -> None:
    for rank in found(ranks):
        _, second, third = rank[strategy, "collectives"]["buffers"]["allocated"]
        assert second
        assert second == third


@pytest.mark.parametrize(("ranks", "strategy"), EVERY)
def test_only_the_new_chunk_travels(found: Found, ranks: int, strategy: str) -> None:
    """What a rank receives is what the formulas say, whatever the cache holds; seven tokens are even nowhere."""
    layout, work = parse_strategy(strategy, ranks), WORK
    for number, rank in enumerate(found(ranks)):
        noted = rank[strategy, "collectives"]
        for name, frames in (("denoise", 2), ("context", 2), ("fused", 4)):
            formula = received(layout, work, number, frames)
            layers = CONFIG.num_layers
            assert noted[name]["comm_stats"] == {k: (layers, layers * n, 8 * layers * n) for k, n in formula.items()}
            assert sum(count for _, count in noted[name]["seen"]) == layers * sum(formula.values())
        assert noted["latents"]["comm_stats"]["latents"][1] == received_latents(work, ranks)
        assert noted["cache"]["bytes"] == cache_bytes(layout, work, number)


@pytest.mark.parametrize(("ranks", "strategy"), EVERY)
def test_keys_and_values_travel_in_the_8_bits_that_are_stored(found: Found, ranks: int, strategy: str) -> None:
    """In bfloat16; `shard-kv` sends none of them."""
    layout, work = parse_strategy(strategy, ranks), replace(WORK, cache="int8", itemsize=2)
    for number, rank in enumerate(found(ranks)):
        elements = {kind: CONFIG.num_layers * n for kind, n in received(layout, work, number, 2).items()}
        assert rank[strategy, "in 8 bits"]["received"] == {kind: (n, 2 * n) for kind, n in elements.items()}
        assert rank[strategy, "in 8 bits"]["cache"] == cache_bytes(layout, work, number)


@pytest.mark.parametrize(("strategy", "share"), [("gather-kv", 0.508), ("ulysses", 0.754), ("shard-kv", 1)])
def test_what_travels_of_a_quantized_cache(strategy: str, share: float) -> None:
    """Of Wan 2.1 1.3B in bfloat16: half of k and v, with a scale for 128 numbers; q and outputs as ever."""
    work = Workload(PRESETS["wan2.1-1.3b"], LatentGrid(30, 52), window=21, chunk_frames=3, steps=4)
    works = work, replace(work, cache="int8")
    whole, quantized = (sum(received(parse_strategy(strategy, 4), work, 0, 3).values()) for work in works)
    assert quantized / whole == pytest.approx(share, abs=1e-3)


@dataclass(frozen=True)
class Drawn:
    """A stream of any shape, and a strategy among those that it allows."""

    ranks: int
    heads: int
    job: Job
    strategy: str
    overlap: bool
    head_groups: int

    def run(self, parallel: SequenceParallel) -> Tensor:
        return self.job.run(parallel, dim=12 * self.heads, num_heads=self.heads)


@st.composite
def streams(draw: st.DrawFn) -> Drawn:
    ranks, heads = draw(st.integers(2, 5)), draw(st.integers(1, 7))
    rows = draw(st.integers(1, 6))
    columns = draw(st.integers(-(-ranks // rows), 4 + ranks // rows))
    chunk, sink = draw(st.integers(1, 3)), draw(st.integers(0, 2))
    window = draw(st.one_of(st.none(), st.integers(chunk + sink, chunk + sink + 5)))
    first = draw(st.booleans()) if window is None or window > 1 else False
    ropes: list[Literal["absolute", "relative"]] = ["absolute", "relative"]
    rope = draw(st.sampled_from(ropes))
    seen = st.sampled_from([None, 0, *range(chunk + sink, chunk + sink + 4)])
    two_layers = tuple(tuple(draw(seen) for _ in range(heads)) for _ in range(CONFIG.num_layers))
    near = tuple(tuple(draw(st.sampled_from([None, 1, 2])) for _ in range(heads)) for _ in range(CONFIG.num_layers))
    policy = draw(st.sampled_from([None, HeadPolicy(two_layers), HeadPolicy(two_layers, near)]))
    similar = None if policy is not None and policy.rows else draw(st.sampled_from([None, 0, 1, 0.4]))
    kinds: list[CacheDtype] = ["model", "int8", "fp8"]
    cache = draw(st.sampled_from(kinds))
    stream = StreamConfig(window, sink, chunk, first, rope, similar_frames=similar, heads=policy, cache=cache)
    known = 0 if first else draw(st.integers(0, 4))
    job = Job(rows, columns, draw(st.integers(1, 8)), stream, draw(st.integers(1, 2)), known, fuse=draw(st.booleans()))
    strategy = draw(st.sampled_from(strategies(ranks, heads)))
    groups = draw(st.integers(1, heads // ranks)) if strategy == "ulysses" else 1
    return Drawn(ranks, heads, job, strategy, draw(st.booleans()), groups)


def run_drawn(group: dist.ProcessGroup, device: str, drawn: Drawn) -> Tensor:
    overlap, head_groups = drawn.overlap, drawn.head_groups
    return drawn.run(SequenceParallel(group, drawn.strategy, device, overlap=overlap, head_groups=head_groups))


@given(drawn=streams())
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_stream_on_any_ranks_equals_one(pool: RankPool, drawn: Drawn) -> None:
    expected = drawn.run(SequenceParallel.single(device="cpu"))
    result = pool.run(run_drawn, drawn.ranks, drawn)
    assert result.shape == expected.shape
    assert relative(result, expected) < 1e-12


@pytest.mark.parametrize("ranks", [2, 4])
def test_even_shards_move_what_the_design_says(ranks: int) -> None:
    work = Workload(CONFIG, LatentGrid(2, 4), window=4, chunk_frames=3, steps=2, itemsize=8)
    even, share = 3 * 8 * CONFIG.dim, (ranks - 1) / ranks
    for name, elements in (("ulysses", 4 * even / ranks * share), ("gather-kv", 2 * even * share)):
        if CONFIG.num_heads % ranks == 0 or name != "ulysses":
            assert sum(received(parse_strategy(name, ranks), work, 0, 3).values()) == elements


@pytest.mark.parametrize("ranks", RANKS)
def test_ranks_that_do_not_fit_are_refused_on_every_rank(found: Found, ranks: int) -> None:
    for rank in found(ranks):
        said = rank["refusals"]
        assert f"{ranks - 1} heads, {ranks} ranks" in said["more ranks than heads"]
        assert f"{ranks} ranks are more than the {ranks - 1} tokens" in said["more ranks than tokens"]
        assert f"7×3 ranks, each 2 or more, and not for {ranks}" in said["a product of other ranks"]
        assert not any("\n" in line for line in said.values())


@pytest.mark.parametrize("ranks", RANKS)
def test_ranks_that_differ_are_named_with_the_field(found: Found, ranks: int) -> None:
    for rank in found(ranks):
        others = ", ".join(map(str, range(ranks - 1)))
        assert rank["disagreement"] == f"ranks differ in prompt: a on {others}; b on {ranks - 1}"
