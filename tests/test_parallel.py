"""Real processes against one: what each rank ends up with, what it sends, and what it refuses."""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from causalrope_sp import Chunk, ConfigError, DiTConfig, LatentGrid, SamplerConfig, StreamConfig, sample_chunks
from causalrope_sp.model import CausalDiT
from causalrope_sp.noise import seeded_noise
from causalrope_sp.parallel import STRATEGIES, SequenceParallel, exchange
from causalrope_sp.parallel.launch import run_ranks
from causalrope_sp.stream import CausalStream, Part
from causalrope_sp.window import SlidingWindow

CONFIG = DiTConfig(dim=36, ffn_dim=48, num_heads=6, num_layers=2, text_dim=8, text_len=3, freq_dim=16, in_channels=2)
WAYS_TO_TALK = (
    "all_to_all",
    "all_gather",
    "all_gather_into_tensor",
    "all_reduce",
    "broadcast",
    "gather",
    "scatter",
    "reduce_scatter_tensor",
    "send",
    "recv",
    "isend",
    "irecv",
    "batch_isend_irecv",
    "barrier",
)
WHOLE = StreamConfig()
COLLECTIVES = {"ulysses": 2, "gather-kv": 1}  # a layer, in a pass


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
    dtype: torch.dtype = torch.float64
    fuse: bool = True

    @property
    def grid(self) -> LatentGrid:
        return LatentGrid(self.rows, self.columns)

    @property
    def frame(self) -> tuple[int, int, int]:
        return CONFIG.in_channels, self.grid.latent_height, self.grid.latent_width

    def run(self, parallel: SequenceParallel) -> Tensor:
        chunks = sample_chunks(
            make_model(self.dtype),
            random(self.batch, CONFIG.text_len, CONFIG.text_dim),
            seeded_noise(0, (self.batch, *self.frame)),
            self.grid,
            self.frames,
            stream=self.stream,
            sampler=SamplerConfig((1000, 500)),
            parallel=parallel,
            initial_latents=random(self.batch, self.known, *self.frame) if self.known else None,
            fuse_context_pass=self.fuse,
        )
        return torch.cat([chunk.latents for chunk in chunks], 1)


JOBS = {
    "window and sink, batch 2": Job(1, 7, 11, StreamConfig(5, 1, 2), batch=2),
    "everything": Job(5, 2, 7),
    "context passes alone": Job(2, 4, 7, StreamConfig(4, 1, 3), fuse=False),
    "lone first frame": Job(1, 5, 8, StreamConfig(4, 0, 3, independent_first_frame=True)),
    "given frames": Job(1, 4, 4, StreamConfig(4, 2, 2), batch=2, known=5),
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
                arrived = sum(args[2]) - args[2][dist.get_rank()]
            elif name == "all_gather_single":
                arrived = args[0].numel() - args[1].numel()
            noted.append((name, arrived))
            return call(*args, **options)

        return noting

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exchange, "_all_gather_single", watched("all_gather_single", exchange._all_gather_single))
        for name in (*WAYS_TO_TALK, "all_to_all_single"):
            patch.setattr(dist, name, watched(name, getattr(dist, name)))
        yield noted


def count_collectives(group: dist.ProcessGroup, device: str, strategy: str) -> dict[str, list[tuple[str, int]]]:
    """The collectives of each kind of pass, and of a whole video of three chunks in two steps."""
    grid, passes = LatentGrid(2, 3), {}
    parallel = SequenceParallel(group, strategy, device)
    shard = parallel.shard(grid)
    embeds = random(1, CONFIG.text_len, CONFIG.text_dim)
    x = random(1, 2, grid.tokens, CONFIG.token_dim)[:, :, shard.start : shard.stop]
    first, second = Chunk(0, 0, 2), Chunk(1, 2, 2)
    with watched_collectives() as noted:
        stream = CausalStream(make_model(), embeds, grid, SlidingWindow(4), parallel)
        for name, run in (
            ("denoise", lambda: stream.denoise(first, x, 1000.0)),
            ("fused", lambda: stream.denoise(second, x, 1000.0, Part(first, x, 0.0))),
            ("context", lambda: stream.commit(Part(second, x, 0.0))),
            ("video", lambda: Job(2, 3, 6, StreamConfig(4, 0, 2)).run(parallel)),
        ):
            noted.clear()
            run()
            passes[name] = list(noted)
    return passes


def refusals(group: dist.ProcessGroup, device: str) -> dict[str, str]:
    """What the sampler says on this rank where the ranks do not fit; nobody may wait for anybody."""
    said = {}
    ranks = group.size()
    for case, strategy, heads, grid in (
        ("more ranks than heads", "ulysses", ranks - 1, LatentGrid(2, 3)),
        ("ranks that do not divide", "ulysses", ranks + 1, LatentGrid(2, 3)),
        ("more ranks than tokens", "gather-kv", 6, LatentGrid(1, ranks - 1)),
    ):
        model = make_model(dim=12 * heads, num_heads=heads)
        embeds = random(1, CONFIG.text_len, CONFIG.text_dim)
        noise = seeded_noise(0, (1, CONFIG.in_channels, grid.latent_height, grid.latent_width))
        parallel = SequenceParallel(group, strategy, device)
        try:
            next(sample_chunks(model, embeds, noise, grid, 3, parallel=parallel))
        except ConfigError as error:
            said[case] = str(error)
    return said


def exercise(group: dist.ProcessGroup, device: str) -> list[dict[str, Any]]:
    """Everything that needs this many ranks, from every rank: starting processes is what costs."""
    torch.set_deterministic_debug_mode("error")  # with the next line: what is never written reads as NaN
    torch.utils.deterministic.fill_uninitialized_memory = True
    mine: dict[str, Any] = {"refusals": refusals(group, device)}
    for strategy, name in itertools.product(STRATEGIES, JOBS):
        mine[strategy, name] = JOBS[name].run(SequenceParallel(group, strategy, device))
    everyone: list[Any] = [None] * group.size()
    mine["collectives"] = {strategy: count_collectives(group, device, strategy) for strategy in STRATEGIES}
    dist.all_gather_object(everyone, mine)
    return everyone


@pytest.fixture(scope="module", params=[2, 3], ids=["2 ranks", "3 ranks"])
def ranks(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """What `exercise` found, rank by rank."""
    found = run_ranks(exercise, request.param)
    assert len(found) == request.param
    return found


@pytest.fixture(scope="module")
def alone() -> dict[str, Tensor]:
    return {name: single(job) for name, job in JOBS.items()}


@pytest.mark.parametrize("name", [name for name, job in JOBS.items() if job.dtype == torch.float64])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_many_ranks_equal_one(ranks: list[dict[str, Any]], alone: dict[str, Tensor], strategy: str, name: str) -> None:
    for rank in ranks:
        assert rank[strategy, name].shape == alone[name].shape
        assert relative(rank[strategy, name], alone[name]) < 1e-12
        assert torch.equal(rank[strategy, name], ranks[0][strategy, name])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_narrow_numbers_cost_no_more_on_many_ranks(
    ranks: list[dict[str, Any]], alone: dict[str, Tensor], strategy: str
) -> None:
    exact = single(replace(JOBS["bfloat16"], dtype=torch.float64))
    for rank in ranks:
        assert relative(rank[strategy, "float32"], alone["float32"]) < 1e-5
        assert relative(rank[strategy, "bfloat16"], exact) < 2 * relative(alone["bfloat16"], exact)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_collectives_of_a_layer_in_a_pass(ranks: list[dict[str, Any]], strategy: str) -> None:
    kind = "all_to_all_single" if strategy == "ulysses" else "all_gather_single"
    expected = [kind] * COLLECTIVES[strategy] * CONFIG.num_layers
    for rank in ranks:
        passes = {name: [call for call, _ in calls] for name, calls in rank["collectives"][strategy].items()}
        assert passes["denoise"] == passes["fused"] == passes["context"] == expected
        a_chunk = 2 * expected + ["all_gather_single"]  # two steps, and at the end one gather of its latents
        assert passes["video"] == 3 * a_chunk


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_only_the_new_chunk_travels(ranks: list[dict[str, Any]], strategy: str) -> None:
    """The numbers that a rank receives, whatever the cache holds, where the shards are even."""
    parts, width = len(ranks), CONFIG.dim
    for rank in ranks:
        for name, frames in (("denoise", 2), ("context", 2), ("fused", 4)):
            tokens = frames * 6
            whole = 4 * tokens // parts * width if strategy == "ulysses" else 2 * tokens * width
            received = sum(count for _, count in rank["collectives"][strategy][name])
            assert received == CONFIG.num_layers * whole * (parts - 1) // parts


def test_ranks_that_do_not_fit_are_refused_on_every_rank(ranks: list[dict[str, Any]]) -> None:
    p = len(ranks)
    for rank in ranks:
        said = rank["refusals"]
        assert f"{p - 1} heads, {p} ranks" in said["more ranks than heads"]
        assert f"{p + 1} heads, {p} ranks" in said["ranks that do not divide"]
        assert f"{p} ranks are more than the {p - 1} tokens" in said["more ranks than tokens"]
        assert not any("\n" in line for line in said.values())


def fail_on_the_last(group: dist.ProcessGroup, device: str) -> None:
    if group.rank() == group.size() - 1:
        raise ConfigError(f"the last rank is out of order at {time.time()}")
    dist.barrier()


def test_a_rank_that_fails_ends_the_others() -> None:
    with pytest.raises(torch.multiprocessing.ProcessRaisedException, match="the last rank is out of order") as caught:
        run_ranks(fail_on_the_last, 2)
    failed = re.search(r"out of order at ([\d.]+)", str(caught.value))
    assert failed
    assert time.time() - float(failed[1]) < 30


def add(group: dist.ProcessGroup | None, device: str, a: int, b: int) -> tuple[object, str, int]:
    return group, device, a + b


def test_one_rank_is_this_process() -> None:
    assert run_ranks(add, 1, 2, 3) == (None, "cpu", 5)


class Ranks:
    """As much of a process group as choosing a strategy asks for."""

    def __init__(self, size: int) -> None:
        self._size = size

    def rank(self) -> int:
        return 0

    def size(self) -> int:
        return self._size


@pytest.mark.parametrize(
    ("size", "heads", "requested", "chosen"),
    [
        (2, 12, "auto", "ulysses"),
        (8, 12, "auto", "gather-kv"),
        (24, 12, "auto", "gather-kv"),
        (2, 12, "gather-kv", "gather-kv"),
        (4, 12, "ulysses", "ulysses"),
    ],
)
def test_auto_is_ulysses_where_it_is_balanced(size: int, heads: int, requested: str, chosen: str) -> None:
    parallel = SequenceParallel(Ranks(size), requested)  # type: ignore[arg-type]
    assert parallel.strategy_name(heads) == chosen
    strategy = parallel.strategy(LatentGrid(5, 5), heads)
    assert strategy.name == chosen
    assert strategy.stored_heads == (heads // size if chosen == "ulysses" else heads)


def test_one_process_is_a_group_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    for parallel in (SequenceParallel.single(device="cpu"), SequenceParallel.from_env("ulysses", device="cpu")):
        assert (parallel.rank, parallel.size, parallel.strategy_name(12)) == (0, 1, "single")
        assert parallel.shard(LatentGrid(2, 3)).tokens == 6
        parallel.close()


def test_unknown_strategies_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"unknown strategy 'ring'; there are: auto, ulysses, gather-kv"):
        SequenceParallel.single("ring")
