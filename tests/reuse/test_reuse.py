"""Reuse between denoise passes: what is kept and what it saves, on one rank and on several."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from causalrope_sp import CausalDiT, Chunk, ConfigError, StreamConfig
from causalrope_sp.attention.base import Strategy
from causalrope_sp.cache.window import SlidingWindow
from causalrope_sp.diffusion.noise import seeded_noise
from causalrope_sp.distributed import SequenceParallel, strategies
from causalrope_sp.distributed.launch import RankPool
from causalrope_sp.distributed.layout import parse_strategy
from causalrope_sp.grid import Shard
from causalrope_sp.planning.cost import plan
from causalrope_sp.planning.counts import chunk_flops, received, received_latents, stored_bytes
from causalrope_sp.planning.machines import H100
from causalrope_sp.planning.workload import Workload
from causalrope_sp.reuse import Broadcast, ReusePlan, ReusePolicy
from causalrope_sp.reuse.policy import CAUSAL_KINDS, KINDS
from causalrope_sp.sampling.pass_inputs import Part
from causalrope_sp.sampling.stream import CausalStream
from causalrope_sp.sampling.stream_options import Source
from causalrope_sp.verification.cases import load_case
from tests.support.model_outputs import note_outputs
from tests.support.reuse_cases import CONFIG, GRID, MIXED, SAMPLER, SHARED, STREAM, TIMESTEPS, make_model, random
from tests.support.streams import run_chunks


def video(
    reuse: ReusePolicy | None,
    parallel: SequenceParallel | None = None,
    frames: int = 8,
    stream: StreamConfig = STREAM,
    **options: Any,
) -> list[Tensor]:
    frame = CONFIG.in_channels, GRID.latent_height, GRID.latent_width
    chunks = run_chunks(
        make_model(),
        random(1, CONFIG.text_len, CONFIG.text_dim),
        seeded_noise(0, (1, *frame)),
        GRID,
        frames,
        stream=stream,
        sampler=SAMPLER,
        parallel=parallel or SequenceParallel.single(device="cpu"),
        reuse=reuse,
        **options,
    )
    return [chunk.latents for chunk in chunks]


@pytest.mark.parametrize("rope", ["absolute", "relative"])
def test_range_1_is_no_reuse_bit_for_bit(rope: Any) -> None:
    ones = ReusePolicy(tuple(Broadcast(kind, 1) for kind in KINDS))
    stream = replace(STREAM, sink=1, rope=rope)
    for plain, reused in zip(video(None, stream=stream), video(ones, stream=stream), strict=True):
        assert torch.equal(plain, reused)


def test_chunks_do_not_share_and_the_context_pass_is_computed() -> None:
    """A chunk alone, from initial latents, is that chunk in its stream: its clean keys come from computed passes, the
    fused one too, and nothing of earlier chunks is left."""
    whole = video(MIXED)
    assert not torch.allclose(torch.cat(whole), torch.cat(video(None)), rtol=1e-3)
    for n in (1, 2, 3):
        noise = seeded_noise(0, (1, CONFIG.in_channels, GRID.latent_height, GRID.latent_width))
        (alone,) = run_chunks(
            make_model(),
            random(1, CONFIG.text_len, CONFIG.text_dim),
            noise,
            GRID,
            2,
            stream=STREAM,
            sampler=SAMPLER,
            initial_latents=torch.cat(whole[:n], 1),
            reuse=MIXED,
        )
        assert (alone.latents - whole[n]).abs().max() < 1e-12
    for fused, apart in zip(whole, video(MIXED, fuse_context_pass=False), strict=True):
        assert (fused - apart).abs().max() < 1e-12


def test_a_redrawn_chunk_counts_from_its_first_pass() -> None:
    """Of eight passes the last five, at range 5: computed once. The same as a policy that names the four after it."""
    frame = CONFIG.in_channels, GRID.latent_height, GRID.latent_width
    source = Source(lambda chunk: random(1, 2, *frame), 3)
    (counted_on, *_), (plain, *_) = (video(ReusePolicy((Broadcast("self", n),)), source=source) for n in (5, 1))
    (by_hand, *_) = video(ReusePolicy((Broadcast("self", 99, steps=(1, 5)),)), source=source)
    assert torch.equal(counted_on, by_hand)
    assert not torch.equal(counted_on, plain)


def test_a_hit_takes_the_current_gate() -> None:
    """By hand: the second pass of a one-layer model in which everything is reused is the residual plus stored outputs
    times the second pass's gates."""
    torch.manual_seed(0)
    model = CausalDiT(replace(CONFIG, num_layers=1)).double().eval().requires_grad_(False)
    every = ReusePolicy(tuple(Broadcast(kind, 2) for kind in CAUSAL_KINDS))
    outputs: dict[str, Tensor] = {}
    block = model.blocks[0]
    note_outputs(model, lambda _, kind, output: outputs.__setitem__(kind, output))
    stream = CausalStream(
        model,
        random(1, CONFIG.text_len, CONFIG.text_dim),
        GRID,
        SlidingWindow(2),
        Shard(GRID),
        Strategy(GRID.tokens, CONFIG.num_heads),
        reuse=ReusePlan(every, (1000.0, 400.0), 1, CAUSAL_KINDS),
    )
    x, y = random(2, 1, 2, GRID.tokens, CONFIG.token_dim)
    stream.denoise(Chunk(0, 0, 2), x, 1000.0)
    kept = dict(outputs)
    outputs.clear()
    velocity = stream.denoise(Chunk(0, 0, 2), y, 400.0)
    assert not outputs, "a module ran in spite of a hit"
    from causalrope_sp.models.causal_dit import sinusoid

    time = model.time_embedding(sinusoid(torch.tensor([400.0]), CONFIG.freq_dim))
    gates = (model.time_projection(time).view(6, -1) + block.modulation)[[2, 5]]
    residual = model.patch_embedding(y.flatten(1, 2)) + kept["self"] * gates[0] + kept["cross"]
    residual = residual + kept["mlp"] * gates[1]
    shift, scale = time + model.head.modulation
    normed = torch.nn.functional.layer_norm(residual, residual.shape[-1:], eps=CONFIG.eps)
    expected = model.head.linear(normed * (1 + scale) + shift).view_as(velocity)
    assert (velocity - expected).abs().max() < 1e-12


def test_reference_cases_do_not_see_a_policy_that_reuses_nothing(goldens: Path) -> None:
    case, expected = load_case(goldens / "dmd-window-sink.safetensors", torch.float64)
    ones = ReusePolicy(tuple(Broadcast(kind, 1) for kind in KINDS))
    made = replace(case, reuse=ones).run(SequenceParallel.single(device="cpu"))
    assert (made - expected).norm() / expected.norm() < 1e-6


def work_of(reuse: ReusePolicy | None) -> Workload:
    return Workload.of(CONFIG, GRID, STREAM, SAMPLER, 6, itemsize=8, reuse=reuse)


def test_flops_of_a_chunk_are_those_that_torch_counts() -> None:
    stream = CausalStream(
        make_model(),
        random(1, CONFIG.text_len, CONFIG.text_dim),
        GRID,
        SlidingWindow(6),
        Shard(GRID),
        Strategy(GRID.tokens, CONFIG.num_heads),
        reuse=work_of(MIXED).reuse[0],
    )
    x = random(1, 2, GRID.tokens, CONFIG.token_dim)
    for n in range(3):
        stream.commit(Part(Chunk(n, 2 * n, 2), x, 0.0))
    stream.denoise(Chunk(3, 6, 2), x, 1000.0)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        for step, t in enumerate(TIMESTEPS):
            stream.denoise(Chunk(4, 8, 2), x, t, Part(Chunk(3, 6, 2), x, 0.0) if step == 0 else None)
    timesteps = len(TIMESTEPS) + 1  # each is embedded once, and not frame by frame
    a_timestep = 2 * CONFIG.dim * (CONFIG.freq_dim + CONFIG.dim + 6 * CONFIG.dim)
    alone = parse_strategy("ulysses", 1)
    assert counter.get_total_flops() == chunk_flops(alone, work_of(MIXED), 0) + timesteps * a_timestep
    assert chunk_flops(alone, work_of(MIXED), 0) < chunk_flops(alone, work_of(None), 0)
    assert stream.stored_bytes == stored_bytes(alone, work_of(MIXED), 0) > 0


def collectives_of_chunks(group: dist.ProcessGroup, device: str) -> list[dict[str, Any]]:
    """On every rank and for every strategy: the video with reuse, and what a steady chunk's collectives moved."""
    mine: dict[str, Any] = {}
    for strategy in strategies(group.size(), CONFIG.num_heads):
        parallel = SequenceParallel(group, strategy, device)
        frame = CONFIG.in_channels, GRID.latent_height, GRID.latent_width
        embeds, moved, latents = random(1, CONFIG.text_len, CONFIG.text_dim), [], []
        for chunk in run_chunks(
            make_model(),
            embeds,
            seeded_noise(0, (1, *frame)),
            GRID,
            10,
            stream=STREAM,
            sampler=SAMPLER,
            parallel=parallel,
            reuse=SHARED,
        ):
            taken = parallel.comm_stats.take()
            moved.append({kind: (e.calls, e.elements) for kind, e in taken.by_kind().items()})
            latents.append(chunk.latents)
        mine[strategy] = {"moved": moved[-1], "latents": torch.cat(latents, 1), "stored": taken.stored_bytes}
    try:
        differ = ReusePolicy((Broadcast("self", 2 + parallel.rank),))
        next(run_chunks(make_model(), embeds, seeded_noise(0, (1, *frame)), GRID, 2, parallel=parallel, reuse=differ))
    except ConfigError as error:
        mine["disagreement"] = str(error)
    everyone: list[Any] = [None] * group.size()
    dist.all_gather_object(everyone, mine)
    return everyone


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_hit_makes_no_collective(pool: RankPool, ranks: int) -> None:
    """The collectives of a chunk are the formula's at every strategy: calls and bytes of computed passes alone."""
    work, alone = work_of(SHARED), torch.cat(video(SHARED, frames=10), 1)
    plain = {cost.strategy: cost for cost in plan(work_of(None), ranks, H100)}
    costs = {cost.strategy: cost for cost in plan(work, ranks, H100)}
    found = pool.run(collectives_of_chunks, ranks)
    attended = [CONFIG.num_layers * (step % 3 == 0) for step in range(8)]  # by hand: range 3 over all timesteps
    for strategy in strategies(ranks, CONFIG.num_heads):
        layout = parse_strategy(strategy, ranks)
        most = 0
        for rank, seen in enumerate(found):
            assert (seen[strategy]["latents"] - alone).norm() / alone.norm() < 1e-12
            moved = dict(seen[strategy]["moved"])
            assert moved.pop("latents") == (1, received_latents(work, ranks))
            assert seen[strategy]["stored"] == stored_bytes(layout, work, rank)
            a_layer = received(layout, work, rank, STREAM.chunk_frames)
            assert moved == {
                kind: (sum(attended), elements * (sum(attended) + CONFIG.num_layers))
                for kind, elements in a_layer.items()
            }
            most = max(most, sum(elements for _, elements in moved.values()))
            assert sum(calls for calls, _ in moved.values()) + 1 == costs[strategy].collectives_per_chunk
        assert 8 * most + 4 * received_latents(work, ranks) == costs[strategy].bytes_per_chunk
        assert costs[strategy].collectives_per_chunk < plain[strategy].collectives_per_chunk / 2
        assert costs[strategy].stored_bytes > plain[strategy].stored_bytes == 0
    assert "ranks differ in reuse" in found[0]["disagreement"]


GUIDED = replace(SAMPLER, guidance_scale=3.0, guidance_interval=(200, 800))


def guided(group: dist.ProcessGroup | None, device: str, cfg: int, reuse: ReusePolicy | None) -> dict[str, Any]:
    """A video of two branches, and on this rank the calls of its last chunk, without those that end it."""
    parallel = SequenceParallel(group, "gather-kv", device, cfg=cfg)
    frame, calls, latents = (CONFIG.in_channels, GRID.latent_height, GRID.latent_width), {}, []
    for chunk in run_chunks(
        make_model(),
        random(1, CONFIG.text_len, CONFIG.text_dim),
        seeded_noise(0, (1, *frame)),
        GRID,
        8,
        stream=STREAM,
        sampler=GUIDED,
        parallel=parallel,
        reuse=reuse,
        negative_embeds=-random(1, CONFIG.text_len, CONFIG.text_dim),
    ):
        calls = {kind: entry.calls for kind, entry in parallel.comm_stats.take().by_kind().items()}
        latents.append(chunk.latents)
    return {"latents": torch.cat(latents, 1), "calls": calls}


def test_each_branch_of_guidance_reuses_its_own(pool: RankPool) -> None:
    """At five of eight steps there are two branches. The negative one counts its own passes: the first of them, which
    carries its context pass, is computed."""
    alone = guided(None, "cpu", 1, SHARED)["latents"]
    ones = ReusePolicy((Broadcast("self", 1), Broadcast("cross", 1)))
    assert torch.equal(guided(None, "cpu", 1, ones)["latents"], guided(None, "cpu", 1, None)["latents"])
    assert not torch.allclose(alone, guided(None, "cpu", 1, None)["latents"], rtol=1e-3)
    work = Workload.of(CONFIG, GRID, STREAM, GUIDED, 6, itemsize=8, reuse=SHARED)
    assert work.passes == [8, 5]
    for ranks, cfg in ((2, 1), (2, 2), (3, 1)):
        found = pool.run(guided, ranks, cfg, SHARED)
        assert (found["latents"] - alone).norm() / alone.norm() < 1e-12
        costs = {cost.strategy: cost for cost in plan(work, ranks, H100, cfg_sizes=[cfg])}
        cost = costs.get("gather-kv") or costs["single"]
        assert sum(found["calls"].values()) == cost.collectives_per_chunk
        if cfg == 1:
            assert found["calls"]["kv"] == CONFIG.num_layers * (3 + 2)  # at steps 0, 3, 6 and, of five, 0 and 3
