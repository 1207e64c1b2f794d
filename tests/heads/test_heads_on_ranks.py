"""Windows of heads on ranks: what is received, cached and computed is what the formulas say."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from causalrope_kernels import Keys
from causalrope_sp import Chunk
from causalrope_sp.cache.window import SlidingWindow
from causalrope_sp.distributed import SequenceParallel, strategies
from causalrope_sp.distributed.launch import RankPool
from causalrope_sp.distributed.layout import parse_strategy
from causalrope_sp.grid import Shard
from causalrope_sp.planning.cost import plan
from causalrope_sp.planning.counts import (
    attention_flops,
    cache_bytes,
    coordinates,
    cross_flops,
    head_imbalance,
    received_in_pass,
    received_means,
)
from causalrope_sp.planning.machines import machine
from causalrope_sp.sampling.pass_inputs import Part
from causalrope_sp.sampling.similar_frames import SimilarFrames
from causalrope_sp.sampling.stream import CausalStream
from tests.support.strategy_runs import CONFIG, HEADS, WORK, make_model, random
from tests.support.streams import strategy_of

WORK_OF_HEADS = replace(WORK, window=8, sink=1, heads=HEADS, similar=6)
COUNTED = ("ulysses", 2)  # torch's counter does not see attention with log-sum-exps; these have heads of two rings


def rows_read(groups: Sequence[Keys]) -> int:
    """The rows that queries of a layer read, summed over heads."""
    of_heads = [own for keys in groups for own in keys.by_rows]
    return sum(keys.k.shape[2] * sum(stop - first for first, stop in keys.rows) for keys in of_heads)


def measured(group: dist.ProcessGroup, device: str) -> list[dict[str, dict[str, Any]]]:
    """By rank and strategy: the cache's bytes, and of passes of a stream with a full window what they receive, the rows
    that heads read, by layer, and FLOPs. The first pass chooses what the second one reads."""
    found = {}
    for strategy in strategies(group.size(), CONFIG.num_heads):
        parallel = SequenceParallel(group, strategy, device)
        shard, work = parallel.shard(WORK.grid), WORK_OF_HEADS
        window, embeds = SlidingWindow(8, 1), random(1, CONFIG.text_len, CONFIG.text_dim)
        similar = SimilarFrames(
            lambda chunk: 2,
            CONFIG,
            sink=1,
            relative=False,
            heads=HEADS.whole(8),
            kept=12,
            communicator=parallel.sp_communicator(),
        )
        strategy_of_rank = strategy_of(parallel, work)
        stream = CausalStream(make_model(), embeds, work.grid, window, shard, strategy_of_rank, similar=similar)
        x = random(1, 2, work.grid.tokens, CONFIG.token_dim)[:, :, shard.start : shard.stop]
        for n in range(5):
            stream.commit(Part(Chunk(n, 2 * n, 2), x, 0.0))
        chunk, passes = Chunk(5, 10, 2), []
        stream.cache.open(chunk)
        counted = (strategy, group.size()) == COUNTED
        for timestep in (1000.0, 500.0):
            parallel.comm_stats.take()
            read = [rows_read(stream.cache.layer(layer).keys(chunk)) for layer in range(CONFIG.num_layers)]
            with FlopCounterMode(display=False) as counter, ExitStack() as stack:
                if counted:
                    stack.enter_context(sdpa_kernel(SDPBackend.MATH))
                stream.denoise(chunk, x, timestep)
            stats = {kind: entry.elements for kind, entry in parallel.comm_stats.take().by_kind().items()}
            of_model = sum(counter.get_flop_counts()["CausalDiT"].values())  # not of timesteps and choices
            passes.append((stats, read, of_model if counted and timestep == 1000.0 else None))
        found[strategy] = {"passes": passes, "cache": stream.cache.bytes}
    gathered: list[Any] = [None] * group.size()
    dist.all_gather_object(gathered, found, group)
    return gathered


@pytest.mark.parametrize("ranks", [2, 3, 4, 5])
def test_ranks_receive_cache_and_compute_what_the_formulas_say(pool: RankPool, ranks: int) -> None:
    work, every = WORK_OF_HEADS, pool.run(measured, ranks)
    for rank, found in enumerate(every):
        for strategy, noted in found.items():
            layout = parse_strategy(strategy, ranks)
            assert noted["cache"] == cache_bytes(layout, work, rank), strategy
            row, _, tokens, rows = coordinates(layout, work, rank)
            linear = 2 * (work.linear_flops * tokens[rank] + cross_flops(work, tokens[rank]))
            queries = 2 * (sum(rows) if layout.inner == "shard-kv" else rows[row])
            for (received, read, flops), chosen in zip(noted["passes"], (None, work.similar), strict=True):
                means = {} if chosen else {"means": received_means(work, ranks) * 12 // 4}  # of all frames so far
                assert received == received_in_pass(layout, work, rank, 2) | means, strategy
                attention = attention_flops(layout, work, rank, 2, 8, chosen)
                assert attention == 4 * CONFIG.head_dim * queries * sum(read), strategy
                assert flops in (None, linear + attention)
    first, later = (np.array([found["ulysses"]["passes"][n][1] for found in every]) for n in range(2))
    forwards = [first + later, *[later] * (work.steps - 1)]  # the first with the context pass of the chunk before
    waited, mean = (sum(of(forward, 0).sum() for forward in forwards) for of in (np.max, np.mean))
    assert head_imbalance(parse_strategy("ulysses", ranks), work) == pytest.approx(waited / mean)


def test_a_plan_has_the_bytes_of_windows_and_their_imbalance() -> None:
    whole, windows = (
        plan(replace(WORK_OF_HEADS, heads=heads), 3, machine("h100", "nvlink")) for heads in (None, HEADS)
    )
    for dense, sparse in zip(whole, windows, strict=True):
        assert sparse.cache_bytes < dense.cache_bytes
        assert sparse.flops_per_chunk < dense.flops_per_chunk
        assert sparse.compute_ms < dense.compute_ms
        assert (sparse.head_imbalance > 1) == ("ulysses" in sparse.strategy)


def test_no_window_that_matters_costs_nothing() -> None:
    """One ring, in the model's order. A later pass of a chunk calls nothing of rings and placements layer by layer."""
    wide = tuple(tuple(None if head % 2 else 8 for head in range(6)) for _ in range(2))
    work = replace(WORK_OF_HEADS, heads=replace(HEADS, windows=wide))
    assert work.head_rings(3) == replace(work, heads=None).head_rings(3)
    strategy = strategy_of(SequenceParallel.single(device="cpu"), work)
    assert strategy.cached is None
    assert not strategy.placements
    layers = 5
    text, x = random(1, CONFIG.text_len, CONFIG.text_dim), random(1, 2, 7, CONFIG.token_dim)
    model = make_model(num_layers=layers)
    stream = CausalStream(model, text, work.grid, SlidingWindow(8, 1), Shard(work.grid), strategy)
    calls: Counter[str] = Counter()

    def note(frame: FrameType, event: str, argument: object) -> None:
        if event == "call" and Path(frame.f_code.co_filename).name in ("head_ring.py", "placement.py", "base.py"):
            calls[frame.f_code.co_name] += 1

    with torch.inference_mode():
        stream.denoise(Chunk(0, 0, 2), x, 1000.0)
        sys.setprofile(note)
        try:
            stream.denoise(Chunk(0, 0, 2), x, 500.0)
        finally:
            sys.setprofile(None)
    often = {name: count for name, count in calls.items() if count >= layers}
    assert often == dict.fromkeys(("attend", "attend_chunk", "write_chunk", "empty"), layers)
