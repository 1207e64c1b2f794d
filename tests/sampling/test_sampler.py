"""The loop against one forward over the whole video, and what it promises to whoever takes its chunks."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from causalrope_kernels.reference import attention, project
from causalrope_sp import Chunk, ConfigError, LatentGrid, SamplerConfig, StreamConfig
from causalrope_sp.attention.base import Strategy
from causalrope_sp.cache.window import SlidingWindow
from causalrope_sp.diffusion.schedule import add_noise, predict_x0, sigmas
from causalrope_sp.grid import Shard, split_into_chunks
from causalrope_sp.models.block import ForwardPass
from causalrope_sp.models.causal_dit import CausalDiT
from causalrope_sp.models.rope import RotaryTables
from causalrope_sp.reuse import find_policy
from causalrope_sp.sampling.pass_inputs import Part
from causalrope_sp.sampling.stream import CausalStream
from causalrope_sp.sampling.stream_options import LowNoiseExpert, Source
from causalrope_sp.verification.reference import block_causal_velocity, visible_past
from tests.support.sampler_cases import CONFIG, FRAME, GRID, MODEL, make_model, noise_of, relative, stream_configs, text
from tests.support.streams import run_chunks

TWO_STEPS = SamplerConfig((1000, 500))


def sample(frames: int, batch: int = 1, **options: Any) -> Tensor:
    model = options.pop("model", MODEL)
    chunks = run_chunks(model, text(batch), noise_of(batch), GRID, frames, **options)
    return torch.cat([chunk.latents for chunk in chunks], 1)


def from_one_forward(
    streamed: Tensor, stream: StreamConfig, sampler: SamplerConfig, redrawn: Tensor | None = None, begin: int = 0
) -> Tensor:
    """The video that the solver reaches when every velocity comes from one forward over all frames at once, with the
    streamed video as the clean past: the streamed video itself, if streaming is exact."""
    batch, frames = streamed.shape[:2]
    cut = split_into_chunks(frames, stream.chunk_frames, independent_first_frame=stream.independent_first_frame)
    chunks, draw = list(cut), noise_of(batch)
    levels = sigmas(sampler)

    def noise(step: int) -> Tensor:
        return torch.cat([draw(chunk, step) for chunk in chunks], 1).double()

    x = noise(0) if redrawn is None else add_noise(redrawn, noise(begin), levels[begin])
    for step, (sigma, to) in list(enumerate(zip(levels, [*levels[1:], 0.0])))[begin:]:
        velocity = block_causal_velocity(
            MODEL, text(batch), GRID, chunks, streamed, x, 1000 * sigma, window=stream.window, sink=stream.sink
        )
        x0 = predict_x0(x, velocity, sigma)
        if sampler.solver == "euler":
            x = x - (sigma - to) * velocity
        else:
            x = add_noise(x0, noise(step + 1), to) if to else x0
    return x


@pytest.mark.parametrize("boundary", [875.0, 500.0, 1001.0])
@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
def test_two_models_share_the_steps_by_noise_level(boundary: float, guidance_scale: float) -> None:
    """Each velocity is that of one forward of the step's own model, which has computed the clean past itself. At 1001
    the second model makes all steps, at 500 the last one alone."""
    other = make_model()
    for parameter in other.parameters():
        parameter.mul_(0.9)
    stream, sampler = StreamConfig(window=5, sink=1, chunk_frames=2), SamplerConfig((1000, 750, 300), shift=1.0)
    sampler = replace(sampler, guidance_scale=guidance_scale)
    negative = text(2)[1:]
    streamed = sample(
        7, stream=stream, sampler=sampler, low_noise=LowNoiseExpert(other, boundary), negative_embeds=negative
    )
    chunks, draw = list(split_into_chunks(7, 2)), noise_of(1)
    x = torch.cat([draw(chunk, 0) for chunk in chunks], 1).double()
    levels = sigmas(sampler)
    for step, (sigma, to) in enumerate(zip(levels, [*levels[1:], 0.0])):
        model = other if 1000 * sigma < boundary else MODEL
        with_text, without = (
            block_causal_velocity(
                model, prompt, GRID, chunks, streamed, x, 1000 * sigma, window=stream.window, sink=stream.sink
            )
            for prompt in (text(1), negative)
        )
        x0 = predict_x0(x, without + guidance_scale * (with_text - without), sigma)
        fresh = torch.cat([draw(chunk, step + 1) for chunk in chunks], 1).double()
        x = add_noise(x0, fresh, to) if to else x0
    assert relative(streamed, x) < 1e-10
    alone = sample(7, stream=stream, sampler=sampler, negative_embeds=negative)
    assert relative(streamed, alone) > 1e-3


def test_the_first_chunk_has_steps_of_its_own() -> None:
    """It is that of a sampler with its steps, and later ones are those of a stream that goes on from it."""
    stream = StreamConfig(window=5, sink=1, chunk_frames=2)
    few, many = SamplerConfig((1000,)), SamplerConfig((1000, 750, 500))
    streamed = sample(6, stream=stream, sampler=replace(few, first_steps=many.steps))
    first = sample(2, stream=stream, sampler=many)
    assert torch.equal(streamed[:, :2], first)
    later = sample(4, stream=stream, sampler=few, initial_latents=first)
    assert relative(streamed[:, 2:], later) < 1e-10
    assert relative(streamed[:, 2:], sample(6, stream=stream, sampler=few)[:, 2:]) > 1e-3


def test_given_frames_are_clean_in_every_pass_of_the_first_chunk() -> None:
    """Against one forward over all frames, in which they have timestep 0."""
    stream, given = StreamConfig(window=6, chunk_frames=3), torch.randn(1, 2, *FRAME).double()
    streamed = sample(3, stream=stream, sampler=SamplerConfig((1000,)), given_frames=given)
    assert torch.equal(streamed[:, :2], given)
    x = noise_of(1)(Chunk(0, 0, 3), 0).double()
    x[:, :2] = given
    step = ForwardPass(
        timesteps_F=torch.tensor([0.0, 0.0, 1000.0]),
        predicted_frames=3,
        rotation=RotaryTables(CONFIG.head_dim, CONFIG.theta, Shard(GRID), MODEL.device, MODEL.dtype).rotation(range(3)),
        text=MODEL.encode_text(text(1)),
        attend=lambda layer, projection: attention(*project(projection)),
    )
    velocity = GRID.unpatchify(MODEL(GRID.patchify(x).flatten(1, 2), step).unflatten(1, (3, -1)))
    assert relative(streamed[:, 2:], (x - velocity)[:, 2:]) < 1e-10


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"given_frames": torch.zeros(1, 4, *FRAME)},
            "given_frames must be at most 3, after no initial latents, not 4",
        ),
        (
            {"given_frames": torch.zeros(1, 1, *FRAME), "initial_latents": torch.zeros(1, 3, *FRAME)},
            "given_frames must be at most 3, after no initial latents, not 1",
        ),
        (
            {"source": Source(lambda _: torch.zeros(1, 3, *FRAME), 0), "sampler": SamplerConfig(first_steps=(500,))},
            "a sampler with first_steps redraws no video",
        ),
        (
            {"low_noise": LowNoiseExpert(MODEL, 900.0), "reuse": find_policy("pab:latte")},
            "reuse must be None where two models share the steps",
        ),
    ],
)
def test_what_a_first_chunk_cannot_have_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        sample(3, **options)


samplers = st.builds(
    SamplerConfig,
    st.sampled_from([(1000,), (1000, 500), (900, 400, 100)]),
    st.sampled_from([1.0, 5.0]),
    st.sampled_from(["renoise", "euler"]),
)


@given(stream_configs(), samplers, st.integers(1, 9), st.integers(1, 2), st.booleans())
@settings(deadline=None, max_examples=25)
def test_streamed_equals_one_block_causal_forward(
    stream: StreamConfig, sampler: SamplerConfig, frames: int, batch: int, fuse: bool
) -> None:
    streamed = sample(frames, batch, stream=stream, sampler=sampler, fuse_context_pass=fuse)
    assert streamed.shape == (batch, frames, *FRAME)
    assert relative(streamed, from_one_forward(streamed, stream, sampler)) < 1e-12


@given(stream_configs(), st.integers(1, 8), st.integers(0, 4), st.integers(1, 2))
@settings(deadline=None, max_examples=20)
def test_fused_equals_unfused(stream: StreamConfig, frames: int, initial_frames: int, batch: int) -> None:
    past = torch.randn(batch, initial_frames, *FRAME, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    options: dict[str, Any] = {"stream": stream, "sampler": TWO_STEPS, "initial_latents": past}
    fused = sample(frames, batch, **options)
    assert relative(sample(frames, batch, fuse_context_pass=False, **options), fused) < 1e-12


@given(stream_configs(), st.integers(1, 3), st.integers(1, 5), st.booleans())
@settings(deadline=None, max_examples=20)
def test_initial_frames_are_continued_as_if_they_had_been_generated(
    stream: StreamConfig, initial_chunks: int, more: int, fuse: bool
) -> None:
    known = initial_chunks * stream.chunk_frames
    if stream.independent_first_frame:
        known += 1 - stream.chunk_frames
    options: dict[str, Any] = {"stream": stream, "sampler": TWO_STEPS, "fuse_context_pass": fuse}
    whole = sample(known + more, **options)
    continued = sample(more, initial_latents=whole[:, :known], **options)
    assert continued.shape[1] == more
    assert relative(continued, whole[:, known:]) < 1e-12


@given(stream_configs(), samplers, st.integers(1, 7), st.integers(1, 2), st.data())
@settings(deadline=None, max_examples=20)
def test_a_redrawn_video_starts_from_its_source_at_the_steps_level(
    stream: StreamConfig, sampler: SamplerConfig, frames: int, batch: int, data: st.DataObject
) -> None:
    begin = data.draw(st.integers(0, len(sampler.steps) - 1))
    clean = torch.randn(batch, frames, *FRAME, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    source = Source(lambda chunk: clean[:, chunk.start : chunk.stop], begin)
    streamed = sample(frames, batch, stream=stream, sampler=sampler, source=source)
    assert relative(streamed, from_one_forward(streamed, stream, sampler, clean, begin)) < 1e-12


def test_from_pure_noise_nothing_is_left_of_a_source() -> None:
    noisy = Source(lambda chunk: torch.full((1, chunk.frames, *FRAME), 7.0), 0)
    assert torch.equal(sample(7, source=noisy), sample(7))


def test_the_window_matters() -> None:
    """What the tests above compare would differ if someone attended too much, too little or the wrong frames."""
    streams = [
        StreamConfig(None, 0, 2),
        StreamConfig(4, 0, 2),
        StreamConfig(4, 1, 2),
        StreamConfig(2, 0, 2),
        StreamConfig(None, 0, 2, independent_first_frame=True),
    ]
    videos = [sample(8, stream=stream) for stream in streams]
    for one, other in itertools.combinations(videos, 2):
        assert relative(one, other) > 1e-4


@pytest.mark.parametrize("sink", [1, 3, 9])
def test_without_a_window_a_sink_changes_nothing(sink: int) -> None:
    """However long the sink: everything is kept anyway."""
    assert torch.equal(sample(3, stream=StreamConfig(None, sink, 2)), sample(3, stream=StreamConfig(None, 0, 2)))


def test_a_batch_is_its_entries_one_by_one() -> None:
    stream = StreamConfig(5, 1, 2)
    both = sample(6, 2, stream=stream)
    draw = noise_of(2)
    for entry in range(2):
        chunks = run_chunks(
            MODEL,
            text(2)[entry : entry + 1],
            lambda chunk, step, entry=entry: draw(chunk, step)[entry : entry + 1],
            GRID,
            6,
            stream=stream,
        )
        alone = torch.cat([chunk.latents for chunk in chunks], 1)
        assert relative(both[entry : entry + 1], alone) < 1e-12


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The tokens of every forward of the model, in order."""
    seen: list[int] = []
    forward = MODEL.forward

    def counting(tokens: Tensor, *rest: Any) -> Tensor:
        seen.append(tokens.shape[1])
        return forward(tokens, *rest)

    monkeypatch.setattr(MODEL, "forward", counting)
    return seen


@pytest.mark.parametrize(("fuse", "after"), [(True, [4, 8, 12]), (False, [4, 9, 14])])
def test_chunks_come_before_their_context_pass_and_the_last_has_none(
    forwards: list[int], fuse: bool, after: list[int]
) -> None:
    chunks = run_chunks(MODEL, text(1), noise_of(1), GRID, 9, fuse_context_pass=fuse)
    assert not forwards
    assert [len(forwards) for _ in chunks] == after
    assert len(forwards) == after[-1]
    one = 3 * GRID.tokens
    later = [2 * one, one, one, one] if fuse else [one] * 5
    assert forwards == [one] * 4 + 2 * later


@pytest.mark.parametrize(("fuse", "first", "total"), [(True, [3, 6, 3], 5), (False, [3, 3, 3, 3], 7)])
def test_initial_frames_take_one_pass_a_chunk(forwards: list[int], fuse: bool, first: list[int], total: int) -> None:
    """Two initial chunks, two generated in two steps; the second initial chunk's pass rides too."""
    past = torch.zeros(1, 6, *FRAME)
    chunks = run_chunks(
        MODEL, text(1), noise_of(1), GRID, 6, sampler=TWO_STEPS, initial_latents=past, fuse_context_pass=fuse
    )
    handed_out = next(chunks)
    assert handed_out.chunk == Chunk(2, 6, 3)
    assert forwards == [GRID.tokens * frames for frames in first]
    assert [chunk.chunk for chunk in chunks] == [Chunk(3, 9, 3)]
    assert len(forwards) == total


def test_timesteps_are_embedded_once_a_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two steps: the first one alone, the other, and the first one beside a context pass."""
    embedded: list[list[float]] = []
    modulation = CausalDiT.modulation

    def noted(self: CausalDiT, timesteps_F: Tensor) -> Any:
        embedded.append(timesteps_F.tolist())
        return modulation(self, timesteps_F)

    monkeypatch.setattr(CausalDiT, "modulation", noted)
    sample(8, stream=StreamConfig(window=6, chunk_frames=2), sampler=SamplerConfig(steps=(1000, 500), shift=1))
    assert embedded == [[1000], [500], [0, 1000]]


def test_an_abandoned_generator_stops_at_once(forwards: list[int]) -> None:
    chunks = run_chunks(MODEL, text(1), noise_of(1), GRID, 9)
    next(chunks)
    chunks.close()
    assert len(forwards) == 4


def test_an_endless_stream_goes_past_any_length() -> None:
    stream = StreamConfig(4, 1, 2, independent_first_frame=True)
    endless = run_chunks(MODEL, text(1), noise_of(1), GRID, None, stream=stream, sampler=TWO_STEPS)
    taken = list(itertools.islice(endless, 20))
    endless.close()
    sizes = [1] + [2] * 19
    starts = list(itertools.accumulate([0, *sizes[:-1]]))
    assert [chunk.chunk for chunk in taken] == [Chunk(i, *at) for i, at in enumerate(zip(starts, sizes))]
    video = torch.cat([chunk.latents for chunk in taken], 1)
    assert video.isfinite().all()
    assert torch.equal(video[:, :9], sample(9, stream=stream, sampler=TWO_STEPS))
    assert relative(video, from_one_forward(video, stream, TWO_STEPS)) < 1e-12


def test_what_is_handed_out_stays_as_it_was() -> None:
    chunks = run_chunks(MODEL, text(1), noise_of(1), GRID, 6, sampler=TWO_STEPS)
    first = next(chunks).latents
    before = first.clone()
    list(chunks)
    assert torch.equal(first, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_models_keep_a_float32_state(dtype: torch.dtype) -> None:
    stream = StreamConfig(5, 1, 2)
    exact = sample(6, stream=stream)
    video = sample(6, stream=stream, model=make_model(dtype))
    assert video.dtype == torch.float32
    assert exact.dtype == torch.float64
    assert relative(video, exact) < (1e-5 if dtype == torch.float32 else 5e-2)


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("abandoned", [0, 1, 2, 3])
def test_a_cancelled_chunk_leaves_no_trace(abandoned: int) -> None:
    """Of any size, after a fused forward and a later pass, in a window that is full: what follows is as without it."""
    window = SlidingWindow(4, 1)
    x = random(4, 1, 3, GRID.tokens, CONFIG.token_dim, seed=3)
    parts = [Part(Chunk(i, 2 * i, 2), x[i, :, :2], 0.0) for i in range(3)]
    stream = CausalStream(MODEL, text(1), GRID, window, Shard(GRID), Strategy(GRID.tokens, MODEL.config.num_heads))
    for part in parts[:2]:
        stream.commit(part)
    stream.denoise(parts[2].chunk, x[3, :, :2], 500.0)
    if abandoned:
        other = Chunk(3, 6, abandoned)
        stream.denoise(other, x[0, :, :abandoned], 1000.0, parts[2])
        stream.denoise(other, x[1, :, :abandoned], 500.0)
        stream.cancel()
    else:
        stream.commit(parts[2])
    stream.cache.check_integrity()
    assert stream.cache.committed == 6
    result = stream.denoise(Chunk(3, 6, 2), x[3, :, :2], 500.0)

    undisturbed = CausalStream(MODEL, text(1), GRID, window, Shard(GRID), Strategy(GRID.tokens, MODEL.config.num_heads))
    for part in parts:
        undisturbed.commit(part)
    assert relative(result, undisturbed.denoise(Chunk(3, 6, 2), x[3, :, :2], 500.0)) < 1e-12


@pytest.mark.parametrize("chunk", [1, 2])
def test_without_a_sink_relative_places_are_absolute_ones(chunk: int) -> None:
    """Scores depend on differences of time alone, and those of the newest frames are the same."""
    stream = StreamConfig(4, 0, chunk)
    expected = sample(9, stream=stream, sampler=TWO_STEPS)
    assert relative(sample(9, stream=replace(stream, rope="relative"), sampler=TWO_STEPS), expected) < 1e-12
    moved = sample(9, stream=replace(stream, sink=1), sampler=TWO_STEPS)
    assert relative(sample(9, stream=replace(stream, sink=1, rope="relative"), sampler=TWO_STEPS), moved) > 1e-4


@pytest.mark.parametrize("fused", [False, True])
def test_relative_places_are_those_within_the_window(fused: bool) -> None:
    """A model of one layer, whose keys do not depend on what was attended before: every chunk against one forward over
    the frames that it sees, counted from 0."""
    torch.manual_seed(0)
    model = CausalDiT(replace(CONFIG, num_layers=1)).double().eval().requires_grad_(False)
    window, sink, embeds = 5, 2, text(1)
    rope = RotaryTables(CONFIG.head_dim, CONFIG.theta, Shard(GRID), model.device, torch.float64)
    stream = CausalStream(
        model,
        embeds,
        GRID,
        SlidingWindow(window, sink),
        Shard(GRID),
        Strategy(GRID.tokens, CONFIG.num_heads),
        relative=True,
    )
    clean, noisy = random(2, 1, 12, GRID.tokens, CONFIG.token_dim, seed=3)
    before: Part | None = None
    for chunk in split_into_chunks(12, 2):
        own = slice(chunk.start, chunk.stop)
        result = stream.denoise(chunk, noisy[:, own], 500.0, before if fused else None)
        before = Part(chunk, clean[:, own], 0.0)
        past = visible_past(chunk, window, sink)
        step = ForwardPass(
            timesteps_F=torch.tensor([0.0] * len(past) + [500.0] * 2),
            predicted_frames=2,
            rotation=rope.rotation(range(len(past) + 2)),
            text=model.encode_text(embeds),
            attend=lambda layer, projection: attention(*project(projection)),
        )
        seen = torch.cat([clean[:, past], noisy[:, own]], 1)
        expected = model(seen.flatten(1, 2), step).view(result.shape)
        assert relative(result, expected) < 1e-12
        if not fused:
            stream.commit(before)


def test_one_chunk_at_a_time() -> None:
    stream = CausalStream(
        MODEL, text(1), GRID, SlidingWindow(4), Shard(GRID), Strategy(GRID.tokens, MODEL.config.num_heads)
    )
    x = random(1, 2, GRID.tokens, CONFIG.token_dim, seed=3)
    stream.denoise(Chunk(0, 0, 2), x, 1000.0)
    with pytest.raises(ConfigError, match="chunk 0 is still open"):
        stream.denoise(Chunk(1, 2, 2), x, 1000.0)
    with pytest.raises(ConfigError, match="chunk 0 is still open"):
        stream.denoise(Chunk(0, 0, 1), x[:, :1], 1000.0)


def take(**changes: Any) -> None:
    call: dict[str, Any] = {"embeds": text(1), "grid": GRID, "frames": 3, "noise": noise_of(1)}
    next(run_chunks(MODEL, **(call | changes)))


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda: take(frames=0), "frames must be at least 1, not 0"),
        (lambda: take(frames=-4), "not -4"),
        (lambda: take(frames=None), "needs a window"),
        (lambda: take(embeds=text(1)[:, :2]), r"\(1, 2, 8\), expected \(batch, 3, 8\)"),
        (lambda: take(embeds=text(1)[..., :5]), r"\(1, 3, 5\)"),
        (lambda: take(embeds=text(1)[0]), r"\(3, 8\)"),
        (lambda: take(grid=LatentGrid(2, 3, (1, 2))), r"patch is \(1, 2\), the model's \(2, 2\)"),
        (lambda: take(initial_latents=torch.zeros(2, 3, *FRAME)), r"expected \(1, frames, 2, 4, 6\)"),
        (lambda: take(initial_latents=torch.zeros(1, 3, 2, 4, 8)), r"\(1, 3, 2, 4, 8\)"),
        (lambda: take(initial_latents=torch.zeros(3, *FRAME)), r"\(3, 2, 4, 6\)"),
        (lambda: take(source=Source(lambda chunk: torch.zeros(0), 4)), "one of the steps 0 to 3, not at 4"),
        (lambda: take(source=Source(lambda chunk: torch.zeros(0), -1)), "not at -1"),
        (lambda: take(source=Source(lambda chunk: torch.zeros(1, 2, *FRAME), 1)), "the source of chunk 0 has shape"),
        (lambda: StreamConfig(window=4, sink=2), r"window 4 is smaller than chunk \+ sink = 3 \+ 2"),
        (lambda: StreamConfig(window=0), "window"),
        (lambda: StreamConfig(chunk_frames=0), "chunk_frames"),
        (lambda: StreamConfig(sink=-1), "sink"),
    ],
)
def test_wrong_input_is_one_clear_line(wrong: Callable[[], object], says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        wrong()
    assert "\n" not in str(caught.value)
