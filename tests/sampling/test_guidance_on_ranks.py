"""Guidance on the mesh axis `cfg`: the same video as one process, and the collectives that `plan` counts."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from causalrope_sp import ConfigError, SequenceParallel
from causalrope_sp.diffusion.schedule import guided_steps
from causalrope_sp.distributed import strategies
from causalrope_sp.distributed.comm_stats import CommStats
from causalrope_sp.distributed.launch import RankPool
from causalrope_sp.planning.cost import plan
from causalrope_sp.planning.machines import CPU
from causalrope_sp.planning.workload import Workload
from tests.support.guided_runs import GUIDED, MANY, STREAM, negative, sample
from tests.support.sampler_cases import CONFIG, GRID, MODEL, noise_of, relative, text
from tests.support.streams import run_chunks

# late: the negative branch makes up for its context pass while the positive one begins a chunk
LATE = replace(GUIDED, shift=1.0, guidance_interval=(0, 800))
SHORT = replace(GUIDED, shift=1.0, guidance_interval=(600, 1000))


def on_ranks(group: dist.ProcessGroup, device: str, cfg: int) -> list[dict[Any, Any]]:
    """Videos, collectives of a chunk in mid-stream and refusals of every rank, in order of rank."""
    half, mine = group.size() // cfg, dict[Any, Any]()
    for strategy in strategies(half, CONFIG.num_heads) if half > 1 else ["ulysses"]:
        for name, sampler in {"all": GUIDED, "late": LATE, "short": SHORT}.items():
            parallel = SequenceParallel(group, strategy, device, cfg=cfg)
            parts = []
            for chunk in run_chunks(
                MODEL,
                text(1),
                noise_of(1),
                GRID,
                8,
                stream=STREAM,
                sampler=sampler,
                negative_embeds=negative(),
                parallel=parallel,
            ):
                parts.append(chunk.latents)
                comm_stats = parallel.comm_stats.take()
            total, kinds = comm_stats.total(), {kind: e.calls for kind, e in comm_stats.by_kind().items()}
            mine[strategy, name] = torch.cat(parts, 1), total.calls, total.elements, kinds
    said = []
    for sampler in (replace(GUIDED, guidance_scale=1.0), GUIDED):
        count = 2 if sampler.guidance_scale == 1 else group.size()
        try:
            parallel = SequenceParallel(group, "auto", device, cfg=count)
            sample(3, sampler=sampler, parallel=parallel)
            said.append("nothing")
        except ConfigError as error:
            said.append(str(error))
    everyone: list[Any] = [None] * group.size()
    dist.all_gather_object(everyone, mine | {"said": said})
    return everyone


Found = Callable[[int, int], list[dict[Any, Any]]]


@pytest.fixture(scope="module")
def found_on(pool: RankPool) -> Found:
    return functools.cache(lambda ranks, cfg: pool.run(on_ranks, ranks, cfg))


@pytest.mark.parametrize(("ranks", "cfg"), [(2, 1), (2, 2), (4, 2)])
def test_branches_on_ranks_make_the_same_video_with_the_collectives_that_plan_counts(
    found_on: Found, ranks: int, cfg: int
) -> None:
    found = found_on(ranks, cfg)
    for name, sampler in {"all": GUIDED, "late": LATE, "short": SHORT}.items():
        alone = sample(8, stream=STREAM, sampler=sampler)
        work = Workload.of(CONFIG, GRID, STREAM, sampler, STREAM.window or 0, itemsize=8)
        # a plan counts a chunk's latents as the float32 that they are for a float32 model
        costs = {cost.strategy: cost for cost in plan(replace(work, itemsize=4), ranks, CPU, cfg_sizes=[cfg])}
        for strategy in [key[0] for key in found[0] if key[1:] == (name,)]:
            cost = costs["single" if ranks == cfg else strategy]
            rows = [rank[strategy, name] for rank in found]
            assert all(torch.equal(row[0], rows[0][0]) for row in rows)
            assert relative(rows[0][0], alone) < 1e-10
            conditional = rows[: ranks // cfg]
            assert all(row[1] == cost.collectives_per_chunk for row in conditional)
            assert max(row[2] for row in conditional) == cost.bytes_per_chunk // 4
            assert max(row[2] for row in rows) == cost.bytes_per_chunk // 4
            assert all(row[3].get("guidance", 0) == (len(MANY) if cfg == 2 else 0) for row in rows)
            steps = sum(guided_steps(sampler))
            for row in rows[ranks // cfg :]:  # the unconditional branch, whose context pass rides or is made up for
                passes = steps if guided_steps(sampler)[0] else steps + 1
                rest = len(MANY) + (ranks > cfg)
                assert row[1] == cost.collectives_per_pass * passes + rest


def test_a_cfg_axis_without_guidance_is_refused_on_every_rank(found_on: Found) -> None:
    for rank in found_on(4, 2):
        assert rank["said"] == [
            "cfg of the mesh must be 1 without guidance (a guidance scale of 1), not 2",
            "cfg of the mesh must be 1 or 2, not 4",
        ]


def test_guidance_branches_that_cross_are_even_for_the_watchdog() -> None:
    """Or a rank that waits in the guidance branch with fewer collectives would be taken for the one that is stuck."""
    busy, idle = CommStats(), CommStats()
    for _ in range(3):
        for _ in range(5):
            busy.begin("kv", 0, 1, torch.zeros(1))
        idle.begin("guidance", -1, 1, torch.zeros(1))
        assert idle.begun > busy.begun
        busy.begin("guidance", -1, 1, torch.zeros(1))
        assert idle.begun == busy.begun


def test_one_cfg_rank_keeps_two_caches_and_two_keep_one_each() -> None:
    work = Workload.of(CONFIG, GRID, STREAM, GUIDED, 5)
    one, two = ({c.strategy: c for c in plan(work, 4, CPU, cfg_sizes=[cfg])} for cfg in (1, 2))
    plain = {c.strategy: c for c in plan(replace(work, guided=0), 4, CPU)}
    assert one["gather-kv"].cache_bytes == 2 * plain["gather-kv"].cache_bytes
    assert two["gather-kv"].cache_bytes == plain["gather-kv"].cache_bytes  # all tokens, one branch
    assert one["gather-kv"].compute_ms == pytest.approx(2 * plain["gather-kv"].compute_ms)
    (chosen,) = [c for c in plan(work, 4, CPU, cfg_sizes=[1, 2]) if c.chosen]
    assert chosen.chunk_ms == min(c.chunk_ms for c in [*one.values(), *two.values()])
