"""Windows of heads on ranks: what is received, cached and computed is what the formulas say."""

from __future__ import annotations

import sys
from collections import Counter
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from causalrope_sp import Chunk
from causalrope_sp.cache.window import SlidingWindow
from causalrope_sp.distributed import SequenceParallel, strategies
from causalrope_sp.distributed.launch import RankPool
from causalrope_sp.distributed.layout import parse_strategy
from causalrope_sp.grid import Shard
from causalrope_sp.planning.cost import plan
from causalrope_sp.planning.counts import attention_flops, cache_bytes, cross_flops, received_in_pass
from causalrope_sp.planning.machines import machine
from causalrope_sp.sampling.pass_inputs import Part
from causalrope_sp.sampling.stream import CausalStream
from tests.support.strategy_runs import CONFIG, HEADS, WORK, make_model, random
from tests.support.streams import strategy_of

WORK_OF_HEADS = replace(WORK, window=8, sink=1, heads=HEADS)
COUNTED = ("ulysses",)  # torch's counter does not see attention with log-sum-exps; ranks that have heads of two rings


def measured(group: dist.ProcessGroup, device: str) -> list[dict[str, dict[str, Any]]]:
    """By rank and strategy: what a pass of a stream with a full window receives, its FLOPs, and the cache's bytes."""
    found = {}
    for strategy in strategies(group.size(), CONFIG.num_heads):
        parallel = SequenceParallel(group, strategy, device)
        shard, work = parallel.shard(WORK.grid), WORK_OF_HEADS
        window, embeds = SlidingWindow(8, 1), random(1, CONFIG.text_len, CONFIG.text_dim)
        stream = CausalStream(make_model(), embeds, work.grid, window, shard, strategy_of(parallel, work))
        x = random(1, 2, work.grid.tokens, CONFIG.token_dim)[:, :, shard.start : shard.stop]
        for n in range(5):
            stream.commit(Part(Chunk(n, 2 * n, 2), x, 0.0))
        parallel.comm_stats.take()
        with FlopCounterMode(display=False) as counter, ExitStack() as stack:
            if strategy in COUNTED and group.size() < 4:
                stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            stream.denoise(Chunk(5, 10, 2), x, 1000.0)
        stats = {kind: entry.elements for kind, entry in parallel.comm_stats.take().by_kind().items()}
        flops = counter.get_total_flops() if strategy in COUNTED and group.size() < 4 else None
        found[strategy] = {"received": stats, "flops": flops, "cache": stream.cache.bytes}
    gathered: list[Any] = [None] * group.size()
    dist.all_gather_object(gathered, found, group)
    return gathered


@pytest.mark.parametrize("ranks", [2, 3, 4, 5])
def test_ranks_receive_cache_and_compute_what_the_formulas_say(pool: RankPool, ranks: int) -> None:
    work, a_timestep = WORK_OF_HEADS, 2 * CONFIG.dim * (CONFIG.freq_dim + CONFIG.dim + 6 * CONFIG.dim)
    for rank, found in enumerate(pool.run(measured, ranks)):
        for strategy, noted in found.items():
            layout = parse_strategy(strategy, ranks)
            assert noted["received"] == received_in_pass(layout, work, rank, 2), strategy
            assert noted["cache"] == cache_bytes(layout, work, rank), strategy
            if noted["flops"] is not None:
                tokens = 2 * (7 // ranks + (rank < 7 % ranks))
                expected = work.linear_flops * tokens + cross_flops(work, tokens)
                assert noted["flops"] == expected + attention_flops(layout, work, rank, 2, 8) + a_timestep


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
