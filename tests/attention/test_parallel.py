"""Real processes against one: what each rank ends up with, what it sends, and what it refuses."""

from __future__ import annotations

import functools
import os
import queue
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from causalrope_sp import Chunk, ConfigError, DiTConfig, LatentGrid, SamplerConfig, StreamConfig
from causalrope_sp.attention import base, ulysses
from causalrope_sp.attention.base import Strategy
from causalrope_sp.cache.window import SlidingWindow
from causalrope_sp.diffusion.noise import seeded_noise
from causalrope_sp.distributed import SequenceParallel, communicator, strategies
from causalrope_sp.distributed.launch import RankPool, run_ranks
from causalrope_sp.distributed.layout import parse_strategy
from causalrope_sp.distributed.watchdog import Watchdog
from causalrope_sp.errors import RankLostError
from causalrope_sp.grid import Shard
from causalrope_sp.models.causal_dit import CausalDiT
from causalrope_sp.planning.cost import cache_bytes, received, received_latents
from causalrope_sp.planning.machines import default_machine
from causalrope_sp.planning.strategy import choose_strategy
from causalrope_sp.planning.workload import Workload
from causalrope_sp.sampling.sampler import Source
from causalrope_sp.sampling.stream import CausalStream, Part
from tests.support.streams import run_chunks, strategy_of

CONFIG = DiTConfig(dim=36, ffn_dim=48, num_heads=6, num_layers=2, text_dim=8, text_len=3, freq_dim=16, in_channels=2)
WAYS_TO_TALK = (
    "all_to_all",
    "all_gather",
    "all_gather_into_tensor",
    "all_reduce",
    "broadcast",
    "gather",
    "scatter",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_tensor",
    "all_gather_object",
    "gather_object",
    "broadcast_object_list",
    "send",
    "recv",
    "isend",
    "irecv",
    "batch_isend_irecv",
    "barrier",
)
WHOLE = StreamConfig()
COLLECTIVES = {"ulysses": 2, "gather-kv": 1, "shard-kv": 2}  # a layer, in a pass; a product makes those of its parts
RANKS = (2, 3, 4, 5, 6)  # at 6 the two sides of a product differ
WORK = Workload(CONFIG, LatentGrid(1, 7), window=6, chunk_frames=2, steps=2, itemsize=8)
EVERY = [(ranks, strategy) for ranks in RANKS for strategy in strategies(ranks, CONFIG.num_heads)]


def make_model(dtype: torch.dtype = torch.float64, **sizes: int) -> CausalDiT:
    torch.manual_seed(0)
    model = CausalDiT(replace(CONFIG, **sizes)).double().eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.mul_(1.5)  # large enough that a token attended too much or too little shows
    return model.to(dtype)


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@dataclass(frozen=True)
class Job:
    """One video; the grids are chosen so that no rank count divides all of them."""

    rows: int
    columns: int
    frames: int
    stream: StreamConfig = WHOLE
    batch: int = 1
    known: int = 0
    redrawn_from: int | None = None
    dtype: torch.dtype = torch.float64
    fuse: bool = True

    @property
    def grid(self) -> LatentGrid:
        return LatentGrid(self.rows, self.columns)

    @property
    def frame(self) -> tuple[int, int, int]:
        return CONFIG.in_channels, self.grid.latent_height, self.grid.latent_width

    def drawing(self, chunk: Chunk) -> Tensor:
        return random(self.batch, self.known + self.frames, *self.frame)[:, chunk.start : chunk.stop]

    def run(self, parallel: SequenceParallel, **sizes: int) -> Tensor:
        chunks = run_chunks(
            make_model(self.dtype, **sizes),
            random(self.batch, CONFIG.text_len, CONFIG.text_dim),
            seeded_noise(0, (self.batch, *self.frame)),
            self.grid,
            self.frames,
            stream=self.stream,
            sampler=SamplerConfig((1000, 500)),
            parallel=parallel,
            initial_latents=random(self.batch, self.known, *self.frame) if self.known else None,
            source=None if self.redrawn_from is None else Source(self.drawing, self.redrawn_from),
            fuse_context_pass=self.fuse,
        )
        return torch.cat([chunk.latents for chunk in chunks], 1)


JOBS = {
    "window and sink, batch 2": Job(1, 7, 11, StreamConfig(5, 1, 2), batch=2),
    "everything": Job(5, 2, 7),
    "context passes alone": Job(2, 4, 7, StreamConfig(4, 1, 3), fuse=False),
    "lone first frame": Job(1, 5, 8, StreamConfig(4, 0, 3, independent_first_frame=True)),
    "given frames": Job(1, 4, 4, StreamConfig(4, 2, 2), batch=2, known=5),
    "redrawn after a given frame": Job(2, 4, 6, StreamConfig(4, 1, 2), known=1, redrawn_from=1),
    "relative places": Job(1, 7, 9, StreamConfig(5, 1, 2, rope="relative"), batch=2),
    "hardly any tokens": Job(3, 1, 5, StreamConfig(3, 0, 1)),
    "float32": Job(1, 7, 6, StreamConfig(5, 1, 2), dtype=torch.float32),
    "bfloat16": Job(1, 7, 6, StreamConfig(5, 1, 2), dtype=torch.bfloat16),
}


def single(job: Job) -> Tensor:
    return job.run(SequenceParallel.single(device="cpu"))


def relative(result: Tensor, expected: Tensor) -> float:
    return ((result.double() - expected.double()).norm() / expected.double().norm()).item()


@contextmanager
def watched_collectives() -> Iterator[list[tuple[str, int]]]:
    """Every collective of this process: its name and the numbers that it brings from other ranks."""
    noted: list[tuple[str, int]] = []

    def watched(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def noting(*args: Any, **options: Any) -> Any:
            arrived = 0
            if name == "all_to_all_single":
                arrived = sum(args[2]) - args[2][args[4].rank()]
            elif name == "all_gather_single":
                arrived = args[0].numel() - args[1].numel()
            noted.append((name, arrived))
            return call(*args, **options)

        return noting

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(communicator, "_all_gather_single", watched("all_gather_single", communicator._all_gather_single))
        for name in (*WAYS_TO_TALK, "all_to_all_single"):
            patch.setattr(dist, name, watched(name, getattr(dist, name)))
        yield noted


def count_collectives(group: dist.ProcessGroup, device: str, strategy: str) -> dict[str, dict[str, Any]]:
    """The collectives of each kind of pass, seen from outside and as the ledger has them: (calls, elements, bytes)."""
    grid, passes = WORK.grid, {}
    parallel = SequenceParallel(group, strategy, device)
    shard = parallel.shard(grid)
    embeds = random(1, CONFIG.text_len, CONFIG.text_dim)
    x = random(1, 2, grid.tokens, CONFIG.token_dim)[:, :, shard.start : shard.stop]
    stream = CausalStream(make_model(), embeds, grid, SlidingWindow(6), shard, strategy_of(parallel, WORK))
    for n in range(3):  # a window three times the chunk, full
        stream.commit(Part(Chunk(n, 2 * n, 2), x, 0.0))
    first, second = Chunk(3, 6, 2), Chunk(4, 8, 2)
    runs = {
        "denoise": lambda: stream.denoise(first, x, 1000.0),
        "fused": lambda: stream.denoise(second, x, 1000.0, Part(first, x, 0.0)),
        "context": lambda: stream.commit(Part(second, x, 0.0)),
        "latents": lambda: parallel.gather_tokens(x, grid),
    }
    with watched_collectives() as noted:
        for name, run in runs.items():
            noted.clear()
            parallel.comm_stats.take()
            run()
            comm_stats = parallel.comm_stats.take()
            by_kind = {kind: (e.calls, e.elements, e.bytes) for kind, e in comm_stats.by_kind().items()}
            passes[name] = {"seen": list(noted), "ledger": by_kind, "layers": set(comm_stats.by_layer())}
    passes["cache"] = {"bytes": stream.cache.bytes}
    stream.cancel()
    allocated = []
    for n in range(5, 8):  # each fused pass after the first finds every buffer there
        stream.denoise(Chunk(n, 2 * n, 2), x, 1000.0, Part(Chunk(n - 1, 2 * n - 2, 2), x, 0.0) if n > 5 else None)
        allocated.append(
            {use: room.data_ptr() for e in parallel._communicators.values() for use, room in e._buffers.items()}
        )
    passes["buffers"] = {"allocated": allocated}
    return passes


def variants(group: dist.ProcessGroup, device: str, strategy: str) -> list[Tensor]:
    """The same video without overlap, and by head groups, where that changes the way it is made."""
    job = JOBS["window and sink, batch 2"]
    ways: list[dict[str, Any]] = [{"overlap": False}]
    if strategy == "ulysses":
        ways += [{"head_groups": 2}, {"head_groups": 3}, {"head_groups": 99}]
    return [job.run(SequenceParallel(group, strategy, device, **way)) for way in ways]


def order_of_events(group: dist.ProcessGroup, device: str, strategy: str) -> list[str]:
    """What one layer of a pass in mid-stream does, in order: sends, waits, attends."""
    events: list[str] = []

    def noting(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*args: Any, **options: Any) -> Any:
            events.append(name)
            return call(*args, **options)

        return noted

    parallel = SequenceParallel(group, strategy, device, head_groups=2)
    shard, model = parallel.shard(WORK.grid), make_model(num_layers=1)
    stream = CausalStream(
        model,
        random(1, 3, 8),
        WORK.grid,
        SlidingWindow(6),
        shard,
        strategy_of(parallel, replace(WORK, config=model.config)),
    )
    x = random(1, 2, WORK.grid.tokens, CONFIG.token_dim)[:, :, shard.start : shard.stop]
    stream.commit(Part(Chunk(0, 0, 2), x, 0.0))
    with pytest.MonkeyPatch.context() as patch:
        for name in ("all_to_all", "all_gather"):
            patch.setattr(communicator.Communicator, name, noting("send", getattr(communicator.Communicator, name)))
        patch.setattr(communicator.AsyncHandle, "wait", noting("wait", communicator.AsyncHandle.wait))
        for module, name in (
            (base, "attention"),
            (base, "attention_parts"),
            (ulysses, "attention"),
        ):
            patch.setattr(module, name, noting("attend", getattr(module, name)))
        stream.denoise(Chunk(1, 2, 2), x, 1000.0)
    return events


def cancelled_in_head_groups(group: dist.ProcessGroup, device: str) -> Tensor:
    """A stream in which a fused chunk is cancelled, in a ring smaller than two chunks, and what is denoised after."""
    parallel = SequenceParallel(group, "ulysses", device, head_groups=2)
    shard = parallel.shard(WORK.grid)
    x = random(4, 1, 2, WORK.grid.tokens, CONFIG.token_dim)[..., shard.start : shard.stop, :]
    embeds = random(1, CONFIG.text_len, CONFIG.text_dim)
    stream = CausalStream(make_model(), embeds, WORK.grid, SlidingWindow(3), shard, strategy_of(parallel, WORK))
    first, second = (Part(Chunk(n, 2 * n, 2), x[n], 0.0) for n in range(2))
    stream.commit(first)
    stream.denoise(Chunk(1, 2, 2), x[1], 1000.0)
    stream.denoise(Chunk(2, 4, 2), x[2], 1000.0, second)
    stream.denoise(Chunk(2, 4, 2), x[3], 500.0)
    stream.cancel()
    return parallel.gather_tokens(stream.denoise(Chunk(2, 4, 1), x[3][:, :1], 1000.0), WORK.grid)


def disagreement(group: dist.ProcessGroup, device: str) -> str:
    parallel = SequenceParallel(group, "gather-kv", device)
    parallel.everyone.agree({"seed": 1, "prompt": "the same"})
    try:
        parallel.everyone.agree({"seed": 1, "prompt": "a" if parallel.rank < parallel.size - 1 else "b"})
    except ConfigError as error:
        return str(error)
    return "nothing"


def refusals(group: dist.ProcessGroup, device: str) -> dict[str, str]:
    """What the sampler says on this rank where the ranks do not fit; nobody may wait for anybody."""
    said = {}
    ranks = group.size()
    for case, strategy, heads, grid in (
        ("more ranks than heads", "ulysses", ranks - 1, LatentGrid(2, 3)),
        ("more ranks than tokens", "gather-kv", 6, LatentGrid(1, ranks - 1)),
        ("a product of other ranks", "ulysses7xshard-kv3", 6, LatentGrid(2, 3)),
    ):
        model = make_model(dim=12 * heads, num_heads=heads)
        embeds = random(1, CONFIG.text_len, CONFIG.text_dim)
        noise = seeded_noise(0, (1, CONFIG.in_channels, grid.latent_height, grid.latent_width))
        try:
            parallel = SequenceParallel(group, strategy, device)
            next(run_chunks(model, embeds, noise, grid, 3, parallel=parallel))
        except ConfigError as error:
            said[case] = str(error)
    return said


def exercise(group: dist.ProcessGroup, device: str) -> list[dict[Any, Any]]:
    """Everything that needs this many ranks, from every rank: starting processes is what costs."""
    torch.set_deterministic_debug_mode("error")  # with the next line: what is never written reads as NaN
    torch.utils.deterministic.fill_uninitialized_memory = True
    mine: dict[Any, Any] = {"refusals": refusals(group, device), "disagreement": disagreement(group, device)}
    for strategy in strategies(group.size(), CONFIG.num_heads):
        for name, job in JOBS.items():
            if group.size() <= job.grid.tokens:
                mine[strategy, name] = job.run(SequenceParallel(group, strategy, device))
        mine[strategy, "variants"] = variants(group, device, strategy)
        mine[strategy, "events"] = order_of_events(group, device, strategy)
        mine[strategy, "collectives"] = count_collectives(group, device, strategy)
    if group.size() <= CONFIG.num_heads // 2:
        mine["cancelled"] = cancelled_in_head_groups(group, device)
    everyone: list[Any] = [None] * group.size()
    dist.all_gather_object(everyone, mine)
    return everyone


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


@pytest.mark.parametrize("name", [name for name, job in JOBS.items() if job.dtype == torch.float64])
@pytest.mark.parametrize(("ranks", "strategy"), EVERY)
def test_many_ranks_equal_one(found: Found, alone: dict[str, Tensor], ranks: int, strategy: str, name: str) -> None:
    results = found(ranks)
    assert len(results) == ranks
    if ranks > JOBS[name].grid.tokens:
        assert (strategy, name) not in results[0]
        return
    for rank in results:
        assert rank[strategy, name].shape == alone[name].shape
        assert relative(rank[strategy, name], alone[name]) < 1e-12
        assert torch.equal(rank[strategy, name], results[0][strategy, name])


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
            assert sum(calls for calls, _, _ in noted["ledger"].values()) == expected
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
            assert noted[name]["ledger"] == {k: (layers, layers * n, 8 * layers * n) for k, n in formula.items()}
            assert sum(count for _, count in noted[name]["seen"]) == layers * sum(formula.values())
        assert noted["latents"]["ledger"]["latents"][1] == received_latents(work, ranks)
        assert noted["cache"]["bytes"] == cache_bytes(layout, work, number)


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
    rows = draw(st.integers(1, 4))
    columns = draw(st.integers(-(-ranks // rows), 4 + ranks // rows))
    chunk, sink = draw(st.integers(1, 3)), draw(st.integers(0, 2))
    window = draw(st.one_of(st.none(), st.integers(chunk + sink, chunk + sink + 5)))
    first = draw(st.booleans()) if window is None or window > 1 else False
    rope = draw(st.sampled_from(["absolute", "relative"]))
    stream = StreamConfig(window, sink, chunk, independent_first_frame=first, rope=rope)
    known = 0 if first else draw(st.integers(0, 4))
    job = Job(rows, columns, draw(st.integers(1, 8)), stream, draw(st.integers(1, 2)), known, fuse=draw(st.booleans()))
    strategy = draw(st.sampled_from(strategies(ranks, heads)))
    return Drawn(ranks, heads, job, strategy, draw(st.booleans()), draw(st.integers(1, 3)))


def run_drawn(group: dist.ProcessGroup, device: str, drawn: Drawn) -> Tensor:
    way = {"overlap": drawn.overlap, "head_groups": drawn.head_groups}
    return drawn.run(SequenceParallel(group, drawn.strategy, device, **way))


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


def fail_on_the_last(group: dist.ProcessGroup, device: str) -> None:
    if group.rank() == group.size() - 1:
        raise ConfigError(f"the last rank is out of order at {time.time()}")
    dist.barrier()


def test_a_rank_that_fails_ends_the_others() -> None:
    with pytest.raises(RankLostError, match=r"rank 1 of 2 failed: (.|\n)*the last rank is out of order") as caught:
        run_ranks(fail_on_the_last, 2)
    failed = re.search(r"out of order at ([\d.]+)", str(caught.value))
    assert failed
    assert time.time() - float(failed[1]) < 30


def end_at_once(group: dist.ProcessGroup, device: str) -> None:
    if group.rank() == 1:
        os._exit(7)
    dist.barrier()


def test_a_rank_that_ends_is_told_with_its_status() -> None:
    with pytest.raises(RankLostError, match=r"rank 1 of 2 failed: it ended with status 7"):
        run_ranks(end_at_once, 2)


def add(group: dist.ProcessGroup | None, device: str, a: int, b: int) -> tuple[object, str, int]:
    return group, device, a + b


def test_one_rank_is_this_process() -> None:
    assert run_ranks(add, 1, 2, 3) == (None, "cpu", 5)


@pytest.mark.parametrize("ranks", range(1, 13))
@pytest.mark.parametrize("heads", [1, 5, 12])
def test_every_strategy_that_is_named_is_one(ranks: int, heads: int) -> None:
    grid = LatentGrid(5, 5)
    for name in strategies(ranks, heads):
        layout = parse_strategy(name, ranks)
        layout.check(heads)
        assert layout.ulysses * layout.sharing == layout.ranks == ranks
        assert sum(layout.heads(heads)) == heads
        assert max(layout.heads(heads)) - min(layout.heads(heads)) <= 1
        work = Workload(replace(CONFIG, dim=12 * heads, num_heads=heads), grid, 4, 2, 2)
        held = sum(cache_bytes(layout, work, rank) for rank in range(ranks))
        copies = layout.sharing if layout.inner == "gather-kv" else 1
        assert held == copies * cache_bytes(parse_strategy("ulysses", 1), work, 0)


def test_one_process_is_a_group_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    for parallel in (SequenceParallel.single(device="cpu"), SequenceParallel.from_env("ulysses", device="cpu")):
        layout = choose_strategy(WORK, default_machine(parallel.device), parallel)
        assert (parallel.rank, parallel.size, layout.name) == (0, 1, "single")
        assert parallel.shard(LatentGrid(2, 3)).tokens == 6
        parallel.close()


def test_unknown_strategies_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"unknown strategy 'ring'; there are: auto, ulysses, gather-kv, shard-kv"):
        SequenceParallel.single("ring")


class Neighbours:
    """Ranks that talk through a store, and what the watchdog of rank 0 says of them."""

    def __init__(self, begun: int, ranks: int = 2, peers: int = 4) -> None:
        self.store, self.said = dist.HashStore(), queue.Queue[str]()
        self.dog = Watchdog(self.store, 0, ranks, lambda: begun, range(peers), self.said.put, silence_s=1.5, stall_s=3)

    def say(self, rank: int, beat: int, begun: int) -> None:
        self.store.set(f"causalrope/alive/{rank}", f"{beat} {begun}")


@pytest.mark.parametrize("ever", [False, True], ids=["never heard of", "silent now"])
def test_a_silent_rank_is_named(ever: bool) -> None:
    ranks = Neighbours(begun=0)
    if ever:
        ranks.say(1, 1, 0)
    assert ranks.said.get(timeout=10) == "rank 1 has not been heard of for 1.5 s: it is gone, or stopped"
    ranks.dog.stop()


def test_the_rank_that_is_furthest_behind_is_the_stuck_one() -> None:
    """Ranks 1 and 3 wait for rank 2 themselves."""
    ranks, started, beat = Neighbours(begun=7, ranks=4), time.monotonic(), 0
    while ranks.said.empty() and time.monotonic() - started < 10:
        beat += 1
        for rank, begun in ((1, 6), (2, 5), (3, 6)):
            ranks.say(rank, beat, begun)
        time.sleep(0.1)
    assert ranks.said.get_nowait() == "rank 2 has held up rank 0 for 3 s: it is stuck"
    ranks.dog.stop()


def test_after_a_failure_the_rank_that_fell_silent_is_named() -> None:
    ranks = Neighbours(begun=0)
    ranks.say(1, 1, 0)
    assert ranks.dog.who_is_silent(3) == "rank 1 is gone: it has stopped giving signs of life"
    ranks.dog.stop()


@pytest.mark.parametrize(("begun", "peers"), [(7, 2), (8, 2), (3, 1)], ids=["waiting too", "ahead", "decodes"])
def test_a_rank_that_nobody_waits_for_is_left_alone(begun: int, peers: int) -> None:
    ranks, started, beat = Neighbours(begun=7, peers=peers), time.monotonic(), 0
    while time.monotonic() - started < 5:
        beat += 1
        ranks.say(1, beat, begun)
        time.sleep(0.1)
    ranks.dog.stop()
    assert ranks.said.empty()
    assert ranks.store.get("causalrope/alive/0") == b"done"
