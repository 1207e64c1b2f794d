"""Chunks made in parallel: cut, fused, read and sharded, against direct formulas and at any number of ranks."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from causalrope_kernels import attention, attention_parts, merge
from causalrope_sp import LatentGrid, SamplerConfig, StreamConfig
from causalrope_sp.diffusion.noise import seeded_noise
from causalrope_sp.distributed import SequenceParallel
from causalrope_sp.distributed.launch import RankPool
from causalrope_sp.grid import Chunk, Shard
from causalrope_sp.sampling.sampler import sample_chunks
from causalrope_sp.vin import ParallelChunksConfig
from causalrope_sp.vin.chunks import AssignedChunks, cut
from causalrope_sp.vin.fusion import fuse, join
from causalrope_sp.vin.network import positions
from causalrope_sp.vin.parallel_forward import ParallelChunksForward
from causalrope_sp.vin.vin_cost import full_flops, parallel_chunks_flops, video_flops, vin_flops_once
from tests.support.exchange_formulas import overlap_elements, read_elements
from tests.support.streams import strategy_of
from tests.support.vin_runs import (
    CHUNKS,
    CONFIG,
    GRID,
    STEPS,
    VIN,
    Job,
    frame_shape,
    make_pair,
    random,
    relative,
    single,
    work_of,
)


@settings(deadline=None, max_examples=60)
@given(
    frames=st.integers(1, 40),
    chunk=st.integers(2, 9),
    overlap=st.integers(1, 4),
    every=st.integers(1, 6),
    chunk_ranks=st.integers(1, 6),
    start=st.integers(0, 3),
)
def test_chunk_ranks_own_every_frame_once(
    frames: int, chunk: int, overlap: int, every: int, chunk_ranks: int, start: int
) -> None:
    overlap = min(overlap, chunk // 2)
    config = ParallelChunksConfig(chunk, overlap, every)
    chunks = cut(frames, config, start)
    assert (chunks[0].start, chunks[-1].stop) == (start, start + frames)
    assert all(later.start == earlier.stop - overlap for earlier, later in pairwise(chunks))
    assert all(c.frames == chunk for c in chunks[:-1])
    assert len(chunks) == 1 or chunks[-1].frames > overlap
    shares = [AssignedChunks(chunks, config, chunk_rank, chunk_ranks) for chunk_rank in range(chunk_ranks)]
    assert [c for share in shares for c in share.chunks] == list(chunks)
    assert [f for share in shares for f in share.owned] == list(range(start, start + frames))
    assert [f for share in shares for f in share.keyframes] == list(range(start, start + frames, every))
    assert max(len(s.chunks) for s in shares) - min(len(s.chunks) for s in shares) <= 1


@pytest.mark.parametrize("frames", [1, 2, 5])
def test_fusion_is_the_formula(frames: int) -> None:
    """((F - W(k))·ε_i[k] + W(k)·ε_{i+1}[k]) / F, number by number."""
    earlier, later = random(2, frames, 3, 4), random(2, frames, 3, 4, seed=2)
    expected = torch.empty_like(earlier)
    for k in range(frames):
        w = k + 0.5
        expected[:, k] = ((frames - w) * earlier[:, k] + w * later[:, k]) / frames
    assert torch.allclose(fuse(earlier, later), expected, rtol=0, atol=1e-15)
    assert torch.allclose(fuse(earlier, later), fuse(later.flip(1), earlier.flip(1)).flip(1), rtol=0, atol=1e-15)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(("frames", "overlap"), [(5, 1), (12, 2), (9, 2), (6, 2), (1, 2), (30, 2)])
def test_joined_chunks_cover_every_frame(frames: int, overlap: int, fused: bool) -> None:
    """Against a walk over frames; on any two ranks of the chunk axis the same as on one."""
    config = ParallelChunksConfig(5, overlap, 1)
    chunks = cut(frames, config)
    said = [random(1, c.frames, 2, 3, seed=c.index) for c in chunks]
    expected = torch.empty(1, frames, 2, 3, dtype=torch.float64)
    for frame in range(frames):
        voices = [(c, said[c.index][:, frame - c.start]) for c in chunks if c.start <= frame < c.stop]
        first, value = voices[0]
        if len(voices) == 2 and fused:
            place = frame - voices[1][0].start + 0.5
            value = ((overlap - place) * value + place * voices[1][1]) / overlap
        expected[:, frame] = value
        assert len(voices) <= 2 and first.index == min(c.index for c, _ in voices)  # noqa: PT018
    assert torch.allclose(join(said, overlap, fused=fused), expected, rtol=0, atol=1e-15)
    for assigned in (AssignedChunks(chunks, config, n, 2) for n in range(2)):
        if not assigned.chunks:
            continue
        before = said[assigned.numbers.start - 1][:, -overlap:] if assigned.has_before else None
        after = said[assigned.numbers.stop][:, :overlap] if assigned.has_after and fused else None
        mine = join([said[n] for n in assigned.numbers], overlap, fused=fused, before=before, after=after)
        assert torch.allclose(mine, expected[:, list(assigned.held)], rtol=0, atol=1e-15)


@pytest.mark.parametrize("shares", [1, 2, 3, 7])
def test_a_sharded_read_is_the_whole_read(shares: int) -> None:
    """Keyframes and tokens of a frame shared out, a share without any among them."""
    _, vin = make_pair()
    embeds, grid = random(2, CONFIG.text_len, CONFIG.text_dim), LatentGrid(2, 3)
    text = vin.text(embeds)
    state = vin.ask(text, torch.tensor([700.0, 300.0]))
    tokens, times = random(2, 4, grid.tokens, CONFIG.token_dim), torch.tensor([1, 3, 5, 7])

    def keys(frames: slice, shard: Shard) -> Any:
        where = positions(times[frames], *shard.rows_and_columns())
        embedded = vin.position_embeddings(where, text)
        return vin.keyframes(tokens[:, frames, shard.start : shard.stop], embedded, state)

    whole = attention(vin.queries(state), keys(slice(None), Shard(grid)))
    bounds = [round(4 * n / shares) for n in range(shares + 1)]
    parts = [
        merge(attention_parts(vin.queries(state), keys(slice(first, stop), Shard(grid, place, 2))))
        for first, stop in pairwise(bounds)
        for place in range(2)
    ]
    assert relative(merge(parts)[0], whole) < 1e-12


def test_one_chunk_without_a_network_is_attention_over_the_whole_video() -> None:
    """The same as a stream of one chunk, which sees the initial frame and itself."""
    job = Job(6, batch=2, chunks=ParallelChunksConfig(6, 1, 2), use_vin=False)
    model, _ = make_pair()
    frame, draw = frame_shape(GRID), seeded_noise(0, (2, *frame_shape(GRID)))

    def noise(chunk: Chunk, step: int) -> Tensor:
        return torch.cat([draw(Chunk(f, f, 1), step) for f in range(chunk.start, chunk.stop)], 1)

    (expected,) = sample_chunks(
        model,
        random(2, CONFIG.text_len, CONFIG.text_dim),
        noise,
        GRID,
        6,
        stream=StreamConfig(chunk_frames=6),
        sampler=STEPS,
        initial_latents=random(2, 1, *frame),
        parallel=SequenceParallel.single(device="cpu"),
    )
    assert relative(single(job), expected.latents) < 1e-12


def step_once(use_vin: bool, held: Tensor) -> Tensor:
    """The first chunk's velocity."""
    model, vin = make_pair()
    parallel = SequenceParallel.single(device="cpu")
    assigned = AssignedChunks(cut(held.shape[1], CHUNKS, 1), CHUNKS)
    embeds = random(1, CONFIG.text_len, CONFIG.text_dim)
    strategy = strategy_of(parallel, work_of(model))
    with torch.inference_mode():
        state = ParallelChunksForward(model, vin if use_vin else None, embeds, GRID, assigned, 1, strategy, parallel)
        state.commit(random(1, 1, GRID.tokens, CONFIG.token_dim))
        return state.velocities(held, 800.0)[0].clone()


def test_global_tokens_carry_across_a_video_in_one_step() -> None:
    """A keyframe of the last chunk changes what the first chunk does; without them nothing does, nor another frame."""
    held = random(1, 14, GRID.tokens, CONFIG.token_dim)
    far, auxiliary = held.clone(), held.clone()
    far[:, 12], auxiliary[:, 13] = random(GRID.tokens, CONFIG.token_dim, seed=3), 0.0
    assert relative(step_once(True, far), step_once(True, held)) > 1e-3
    assert torch.equal(step_once(True, auxiliary), step_once(True, held))
    assert torch.equal(step_once(False, far), step_once(False, held))


def on_ranks(group: Any, device: str, job: Job, chunk_ranks: int, strategy: str) -> Tensor:
    """The video, after every rank has held what it received against the formulas."""
    parallel = SequenceParallel(group, strategy, device, chunk=chunk_ranks)
    video = job.video(parallel)
    moved = parallel.comm_stats.by_kind()
    assigned = AssignedChunks(
        cut(job.frames, job.chunks, job.initial_frames), job.chunks, parallel.chunk_rank, chunk_ranks
    )
    tokens, steps, itemsize = parallel.shard(GRID).tokens, len(job.sampler.steps), job.dtype.itemsize
    wide = max(4, itemsize)
    read = steps * read_elements(VIN, parallel.size, job.batch, itemsize)
    assert (moved["read"].elements, moved["read"].bytes) == (read, read * itemsize)
    fused = [job.chunks.fuses(step, steps) for step in range(steps)]
    assert set(fused) == {True, False}, "both kinds of step"
    overlap = sum(overlap_elements(CONFIG, assigned, tokens, job.batch, is_fused) for is_fused in fused)
    if chunk_ranks > 1:
        assert (moved["overlap"].elements, moved["overlap"].bytes) == (overlap, overlap * wide)
    else:
        assert "overlap" not in moved
    everyone: list[Any] = [None] * parallel.size
    torch.distributed.all_gather_object(everyone, video)
    assert all(torch.equal(video, other) for other in everyone)
    return video


JOBS = {
    "five chunks": Job(17),
    "fresh noise, batch 2": Job(12, batch=2, sampler=replace(STEPS, solver="renoise"), initial_frames=2),
    "no initial frame, a short last chunk": Job(9, initial_frames=0),
    "guided": Job(17, chunks=replace(CHUNKS, global_guidance_scale=2.5, global_guidance_interval=(500, 800))),
    "guided, float32": Job(11, chunks=replace(CHUNKS, global_guidance_scale=2.5), dtype=torch.float32),
    "float32": Job(14, dtype=torch.float32),
    "bfloat16": Job(11, dtype=torch.bfloat16),
}
BOUNDS = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 0.05}


@pytest.mark.parametrize(
    ("ranks", "chunk_ranks", "strategy"),
    [
        (2, 2, "auto"),
        (2, 1, "gather-kv"),
        (3, 3, "auto"),
        (4, 2, "ulysses"),
        (4, 2, "gather-kv"),
        (4, 2, "shard-kv"),
        (4, 4, "auto"),
        (6, 1, "ulysses2xshard-kv3"),
        (6, 2, "shard-kv"),
        (6, 6, "auto"),  # more ranks than chunks
    ],
)
def test_any_mesh_makes_the_same_video(pool: RankPool, ranks: int, chunk_ranks: int, strategy: str) -> None:
    for name, job in JOBS.items():
        if ranks < 5 or job.dtype == torch.float64:
            result = pool.run(on_ranks, ranks, job, chunk_ranks, strategy)
            assert relative(result, single(job)) < BOUNDS[job.dtype], name


def test_every_step_is_reported_and_previews_where_asked() -> None:
    parallel = SequenceParallel.single(device="cpu")
    outputs = Job(12, preview_every=2).outputs(parallel)
    assert [(m.step, m.steps, m.latents is not None) for m in outputs] == [
        (1, 4, False),
        (2, 4, True),
        (3, 4, False),
        (4, 4, True),
    ]
    preview, last = outputs[1].latents, outputs[3].latents
    assert preview is not None
    assert last is not None
    assert torch.equal(last, single(Job(12)))
    assert preview.shape == last.shape


def attention_flops(q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...], *_: Any, **__: Any) -> int:
    return 4 * q[0] * q[1] * q[2] * k[2] * q[3]


def counting() -> FlopCounterMode:
    """torch's counter, which does not know attention on a CPU."""
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return FlopCounterMode(display=False, custom_mapping={attention: attention_flops})


def test_flops_are_those_that_torch_counts() -> None:
    model, vin = make_pair(torch.float32)
    chunks = cut(11, CHUNKS, 1)
    parallel = SequenceParallel.single(device="cpu")
    embeds = torch.zeros(1, CONFIG.text_len, CONFIG.text_dim)
    strategy = strategy_of(parallel, work_of(model))

    video = AssignedChunks(chunks, CHUNKS)
    where = positions(torch.tensor(video.keyframes), *Shard(GRID).rows_and_columns())
    with torch.inference_mode():
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            vin.position_embeddings(where, vin.text(embeds))
        assert counter.get_total_flops() == vin_flops_once(CONFIG, VIN, GRID, len(video.keyframes))
        state = ParallelChunksForward(model, vin, embeds, GRID, video, 1, strategy, parallel)
        state.commit(torch.zeros(1, 1, GRID.tokens, CONFIG.token_dim))
        for attend_globals, network in ((True, VIN), (False, None)):
            with counting() as counter, sdpa_kernel(SDPBackend.MATH):
                state.velocities(torch.zeros(1, 11, GRID.tokens, CONFIG.token_dim), 500.0, attend_globals)
            assert counter.get_total_flops() == parallel_chunks_flops(CONFIG, network, GRID, 11, CHUNKS, 1)
    assert full_flops(CONFIG, GRID, 11, 1) == parallel_chunks_flops(
        CONFIG, None, GRID, 11, ParallelChunksConfig(11, 1, 1), 1
    )


@pytest.mark.parametrize("scale", [0, 0.5, 3])
def test_guidance_by_global_tokens_is_the_formula(scale: float) -> None:
    """In one step, where a video is linear in velocities: v⁻ + s·(v⁺ - v⁻)."""
    job = Job(14, sampler=SamplerConfig((1000,), shift=1.0, solver="euler"))
    guided = replace(job, chunks=replace(CHUNKS, global_guidance_scale=scale))
    without, with_tokens = single(replace(job, use_vin=False)), single(job)
    assert relative(with_tokens, without) > 1e-3
    assert relative(single(guided), without + scale * (with_tokens - without)) < 1e-12
    assert torch.equal(single(replace(guided, use_vin=False)), without), "nothing to guide by"


def test_steps_outside_the_interval_are_not_guided(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    job, forwards = Job(14), list[tuple[float, bool]]()
    velocities = ParallelChunksForward.velocities

    def noted(state: ParallelChunksForward, held: Tensor, timestep: float, attend_globals: bool = True) -> list[Tensor]:
        forwards.append((timestep, attend_globals))
        return velocities(state, held, timestep, attend_globals)

    monkeypatch.setattr(ParallelChunksForward, "velocities", noted)
    between = replace(CHUNKS, global_guidance_scale=2, global_guidance_interval=(500, 750))
    single(replace(job, chunks=between))
    assert forwards == [(1000, True), (750, True), (750, False), (500, True), (500, False), (250, True)]
    with caplog.at_level("WARNING"):
        outside = single(replace(job, chunks=replace(between, global_guidance_interval=(600, 700))))
    assert torch.equal(outside, single(job))
    assert "interval is 600 to 700, and the 4 steps are at timesteps 250 to 1000" in caplog.text


def test_flops_of_guidance_are_those_that_torch_counts() -> None:
    """What two guided steps of a video add."""

    def counted(chunks: ParallelChunksConfig) -> int:
        with counting() as counter, sdpa_kernel(SDPBackend.MATH):
            single(Job(11, dtype=torch.float32, chunks=chunks))
        return int(counter.get_total_flops())

    guided = replace(CHUNKS, global_guidance_scale=2, global_guidance_interval=(500, 750))
    formula = [video_flops(CONFIG, VIN, GRID, 11, CHUNKS, 4, 1, guided_steps=steps) for steps in (0, 2)]
    assert counted(guided) - counted(CHUNKS) == formula[1] - formula[0] > 0


def test_any_solver_leads_from_step_to_step() -> None:
    """diffusers' UniPC over chunks made together, at the timesteps that it tells the model."""
    job = Job(11, sampler=SamplerConfig((999, 700, 400), shift=1.0, solver="unipc"))
    euler = replace(job, sampler=replace(job.sampler, solver="euler"))
    assert single(job).isfinite().all()
    assert not torch.equal(single(job), single(euler))
    # one step to the end is the same by both
    last = SamplerConfig((999,), shift=1.0, solver="unipc")
    assert (
        relative(single(replace(job, sampler=last)), single(replace(euler, sampler=replace(last, solver="euler"))))
        < 1e-10
    )


def test_values_of_the_read_know_no_positions_and_its_size_does_not_matter() -> None:
    """Keys know positions, what the text says of them, and the noise level; queries the text and the noise level."""
    _, vin = make_pair()
    tokens, where, level = random(1, 2, 7, CONFIG.token_dim), random(2, 7, 3, seed=2), torch.tensor([800.0])
    text, other_text = vin.text(random(1, 3, CONFIG.text_dim)), vin.text(random(1, 3, CONFIG.text_dim, seed=3))
    embedded, state = vin.position_embeddings(where, text), vin.ask(text, level)
    one = vin.keyframes(tokens, embedded, state)
    for other in (
        vin.keyframes(tokens, vin.position_embeddings(where + 1, text), state),
        vin.keyframes(tokens, vin.position_embeddings(where, other_text), state),
        vin.keyframes(tokens, embedded, vin.ask(text, 0.5 * level)),
    ):
        assert torch.equal(one.v, other.v)
        assert not torch.allclose(one.k, other.k)
    for other_state in (vin.ask(other_text, level), vin.ask(text, 0.5 * level)):
        assert not torch.allclose(vin.queries(state), vin.queries(other_state))
    read = random(1, VIN.global_tokens, VIN.heads, VIN.dim // VIN.heads)
    assert relative(vin.process(read, state), vin.process(100 * read, state)) < 1e-4


def test_positions_are_embedded_some_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    _, vin = make_pair()
    where, text = random(3, 7, 3, seed=2), vin.text(random(2, 3, CONFIG.text_dim))
    expected = vin.position_embeddings(where, text)
    monkeypatch.setattr("causalrope_sp.vin.network.AT_ONCE", 4)
    assert relative(vin.position_embeddings(where, text), expected) < 1e-12
