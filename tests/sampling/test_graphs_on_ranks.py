"""Passes by graphs on several ranks: the video of eager passes, the same counts, and one decision for all ranks."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from causalrope_kernels import backend
from causalrope_sp import SamplerConfig, SequenceParallel, StreamConfig
from causalrope_sp.distributed.launch import RankPool
from causalrope_sp.models.causal_dit import CausalDiT
from tests.support.cpu_graph import RecordedGraph, capture_on_cpu
from tests.support.graph_runs import install, video
from tests.support.reuse_cases import CONFIG, SAMPLER, SHARED

STREAM = StreamConfig(window=6, chunk_frames=2)


def counted(parallel: SequenceParallel, stream: StreamConfig, **options: Any) -> tuple[Tensor, dict[Any, Any]]:
    """A video, and the calls, elements and bytes of the collectives of each kind and layer."""
    made = video(stream, parallel=parallel, **options)
    entries = parallel.comm_stats.take().entries
    return made, {key: (e.calls, e.elements, e.bytes) for key, e in entries.items()}


def by_both(
    group: dist.ProcessGroup, device: str, strategy: str, stream: StreamConfig, options: dict[str, Any]
) -> list[dict[str, Any]]:
    """What every rank made of a video by eager passes and by graphs."""
    eager, counts = counted(SequenceParallel(group, strategy, device), stream, **options)
    with pytest.MonkeyPatch.context() as patch:
        made = install(patch)
        found, counts_by_graphs = counted(SequenceParallel(group, strategy, device), stream, **options)
    graphs = list(made[0]._graphs.values())
    for graph in graphs:  # the first replay of each graph repeats a pass
        for name, layer, entry in graph.collectives.entries:
            calls, elements, size = counts[name, layer]
            counts[name, layer] = calls + 1, elements + entry.elements, size + entry.bytes
    mine = {"same": torch.equal(found, eager), "replays": made[0].replays, "graphs": len(graphs)}
    mine["counts"] = counts_by_graphs == counts
    everyone: list[Any] = [None] * group.size()
    dist.all_gather_object(everyone, mine)
    return everyone


@pytest.mark.parametrize(
    ("strategy", "ranks", "graphs", "replays"),
    [
        ("ulysses", 2, 2, 12),
        ("shard-kv", 2, 2, 12),
        ("gather-kv", 2, 5, 3),  # by torch a graph for each place of the chunk in the ring, of which there are three
        ("ulysses2xgather-kv2", 4, 5, 3),
        ("ulysses2xshard-kv2", 4, 2, 12),
    ],
)
def test_ranks_by_graphs_make_the_eager_video(
    pool: RankPool, strategy: str, ranks: int, graphs: int, replays: int
) -> None:
    for found in pool.run(by_both, ranks, strategy, STREAM, {}):
        assert found["same"]
        assert found["graphs"] == graphs
        assert found["counts"], "a replay counts the collectives of its graph"
        assert found["replays"] == replays, "of 24 passes"


def by_triton(
    group: dist.ProcessGroup, device: str, strategy: str, stream: StreamConfig, attention: str
) -> tuple[float, int, int]:
    """The error of a video by graphs of Triton's kernels, the graphs, and the replays."""
    options: dict[str, Any] = {"frames": 8, "sampler": SamplerConfig((1000, 500))}
    model = CausalDiT(replace(CONFIG, num_layers=1, dim=12, num_heads=2)).eval().requires_grad_(False)
    for parameter in model.parameters():
        dist.broadcast(parameter, 0)
    expected = video(stream, model, parallel=SequenceParallel(group, strategy, device), **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "runs_triton", lambda device: True)
        made = install(patch)
        parallel = SequenceParallel(group, strategy, device, attention=attention)
        found = video(stream, model, parallel=parallel, **options)
    return ((found - expected).norm() / expected.norm()).item(), len(made[0]._graphs), made[0].replays


@pytest.mark.parametrize(
    ("strategy", "rope", "attention", "replays"),
    [("gather-kv", "relative", "auto", 1), ("shard-kv", "absolute", "triton", 3)],
)
def test_one_graph_serves_a_window_that_fills_and_rotates_by_triton(
    pool: RankPool, strategy: str, rope: Literal["absolute", "relative"], attention: str, replays: int
) -> None:
    """Of four chunks with two passes each. Where gather-kv splits the window, passes that write frame 0 are of other
    kinds."""
    stream = StreamConfig(window=5, sink=1, chunk_frames=2, rope=rope)
    error, graphs, replayed = pool.run(by_triton, 2, strategy, stream, attention)
    assert error < 1e-5
    assert graphs == 2
    assert replayed == replays


def test_ranks_by_graphs_reuse_outputs(pool: RankPool) -> None:
    for found in pool.run(by_both, 2, "ulysses", STREAM, {"sampler": SAMPLER, "reuse": SHARED}):
        assert found["same"]
        assert found["counts"]
        assert found["replays"] > 0


def failing(
    group: dist.ProcessGroup, device: str, rank: int, how: Literal["capture", "replay"]
) -> list[tuple[bool, int, list[str]]]:
    """A video whose graphs fail on one rank; from every rank whether it is the eager one, the replays and the lines."""
    eager = video(STREAM, parallel=SequenceParallel(group, "ulysses", device))
    lines: list[str] = []

    def capture(run: Callable[[], Tensor]) -> tuple[RecordedGraph, Tensor]:
        graph, output = capture_on_cpu(run)
        if group.rank() == rank and how == "capture":
            raise RuntimeError("operation not permitted\nlong trace")
        if group.rank() == rank:
            graph.calls.append(output.zero_)
        return graph, output

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    keep = Keep(logging.WARNING)
    logging.getLogger("causalrope_sp").addHandler(keep)
    with pytest.MonkeyPatch.context() as patch:
        made = install(patch, capture)
        same = torch.equal(video(STREAM, parallel=SequenceParallel(group, "ulysses", device)), eager)
    logging.getLogger("causalrope_sp").removeHandler(keep)
    everyone: list[Any] = [None] * group.size()
    dist.all_gather_object(everyone, (same, made[0].replays, lines))
    return everyone


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("how", "why"),
    [("capture", "operation not permitted"), ("replay", "its output differs from that of the eager pass")],
)
def test_one_rank_that_fails_makes_all_of_them_eager(
    pool: RankPool, rank: int, how: Literal["capture", "replay"], why: str
) -> None:
    first, second = pool.run(failing, 2, rank, how)
    assert first == (True, 0, [f"passes run without CUDA graphs: {why} (on rank {rank})"])
    assert second == (True, 0, [])
