"""What a plan says of a window that is computed anew before each chunk: FLOPs by torch, collectives by a run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils.flop_counter import FlopCounterMode

from causalrope_sp import LatentGrid, SamplerConfig, SequenceParallel, StreamConfig
from causalrope_sp.diffusion.noise import seeded_noise
from causalrope_sp.distributed import strategies
from causalrope_sp.distributed.launch import RankPool
from causalrope_sp.distributed.layout import parse_strategy
from causalrope_sp.planning.cost import plan
from causalrope_sp.planning.counts import chunk_flops, received_latents
from causalrope_sp.planning.machines import H100
from causalrope_sp.planning.workload import Workload
from causalrope_sp.sampling.chunk_loop import ChunkLoop
from causalrope_sp.sampling.stream_options import StreamOptions
from tests.support.strategy_runs import CONFIG, make_model

GRID = LatentGrid(2, 3)
STREAM = StreamConfig(10, 1, 2, window_policy="recomputed")  # 8 frames stay: 1 of the sink, 1 + 2 + 2, and 2 pending
SAMPLER = SamplerConfig((1000, 500))
WORK = Workload.of(CONFIG, GRID, STREAM, SAMPLER, 10, itemsize=8)


def loop_of(parallel: SequenceParallel) -> ChunkLoop:
    frame = CONFIG.in_channels, GRID.latent_height, GRID.latent_width
    embeds = torch.randn(1, CONFIG.text_len, CONFIG.text_dim, generator=torch.Generator().manual_seed(0)).double()
    options = StreamOptions(stream=STREAM, sampler=SAMPLER)
    loop = ChunkLoop(make_model(), embeds, seeded_noise(0, (1, *frame)), GRID, None, parallel, options)
    for _ in range(7):
        loop.step()
    return loop


def test_the_passes_are_those_of_the_frames_that_stay() -> None:
    assert WORK.recomputed == ((1, 2), (2, 4), (2, 6))


@torch.inference_mode()
def test_flops_of_a_chunk_are_those_that_torch_counts() -> None:
    """Linear layers by torch's counter, which does not see attention on separate ranges of keys; attention by hand."""
    loop = loop_of(SequenceParallel.single(device="cpu"))
    with FlopCounterMode(display=False) as counter:
        loop.step()
    linear = counter.get_flop_counts()["Global"][torch.ops.aten.addmm]
    frames = (1 * 2 + 2 * 4 + 2 * 6) + (2 * 8 + 2 * 10) + 2 * 10  # queries × keys: anew, the fused pass, the second one
    attended = 4 * CONFIG.num_layers * CONFIG.dim * frames * GRID.tokens**2
    text = 4 * CONFIG.dim * CONFIG.text_len * GRID.tokens * (11 * CONFIG.num_layers - 2)  # in the last layer 2 leave it
    assert linear + attended + text == chunk_flops(parse_strategy("ulysses", 1), WORK, 0)


@torch.inference_mode()
def moved(group: dist.ProcessGroup, device: str) -> dict[str, Any]:
    found = {}
    for strategy in strategies(group.size(), CONFIG.num_heads):
        parallel = SequenceParallel(group, strategy, device)
        loop = loop_of(parallel)
        parallel.comm_stats.take()
        loop.step()
        kinds = parallel.comm_stats.take().by_kind()
        found[strategy] = {kind: (entry.calls, entry.elements) for kind, entry in kinds.items()}
    everyone: list[Any] = [None] * group.size()
    dist.all_gather_object(everyone, found)
    return {strategy: [found[strategy] for found in everyone] for strategy in found}


@pytest.mark.parametrize("ranks", [2, 3])
def test_collectives_of_a_chunk_are_the_plans(pool: RankPool, ranks: int) -> None:
    found = pool.run(moved, ranks)
    for cost in plan(WORK, ranks, H100):
        by_rank = found[cost.strategy]
        assert sum(calls for calls, _ in by_rank[0].values()) == cost.collectives_per_chunk
        attended = [sum(n for kind, (_, n) in rank.items() if kind != "latents") for rank in by_rank]
        assert 8 * max(attended) + 4 * received_latents(WORK, ranks) == cost.bytes_per_chunk
