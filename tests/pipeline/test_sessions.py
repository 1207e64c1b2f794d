"""Sessions of the embedded model: what can be done to one between two chunks, on one rank and on several."""

from __future__ import annotations

import gc
import threading
import time
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed import all_gather_object

from causalrope_sp import CausalVideoPipeline, ConfigError, PromptError, SequenceParallel, VideoChunk
from causalrope_sp.distributed.launch import RankPool
from causalrope_sp.errors import RankLostError
from causalrope_sp.pipeline.decoding import LocalFrames
from causalrope_sp.pipeline.session import Session
from causalrope_sp.sampling.guidance import GuidanceBranch

RED, BLUE = "a red circle slides right", "a blue circle slides right"
OPTIONS: dict[str, Any] = {"num_inference_steps": 2, "window": 7, "sink": 1}


@pytest.fixture(scope="module", params=["inline", "overlap"])
def pipe(request: pytest.FixtureRequest) -> CausalVideoPipeline:
    return CausalVideoPipeline.from_pretrained("toybox", decode=request.param)


def opened(pipe: CausalVideoPipeline, **options: Any) -> Session:
    return pipe.open(RED, seed=3, **OPTIONS | options)


def frames_of(chunks: list[VideoChunk]) -> np.ndarray:
    return np.concatenate([chunk.frames for chunk in chunks if chunk.frames is not None])


def take(session: Session, count: int) -> list[VideoChunk]:
    return [session.step() for _ in range(count)]


def same(one: list[VideoChunk], other: list[VideoChunk]) -> bool:
    return [c.index for c in one] == [c.index for c in other] and np.array_equal(frames_of(one), frames_of(other))


def test_a_stream_is_a_session_with_an_end(pipe: CausalVideoPipeline) -> None:
    stream = list(pipe.stream(RED, seed=3, num_frames=40, **OPTIONS))
    with opened(pipe, num_frames=40) as session:
        assert same(list(session), stream)
        assert session.is_complete
        with pytest.raises(StopIteration):
            session.step()
    with opened(pipe) as endless:
        chunks = take(endless, 4)
        assert np.array_equal(frames_of(chunks)[:40], frames_of(stream)), "the last chunk of the stream is trimmed"
        assert endless.is_open
    for chunk in chunks:
        assert chunk.timings.denoise > 0
        assert chunk.timings.decode > 0


def test_two_sessions_of_a_pipeline_in_any_order_are_what_each_is_alone(pipe: CausalVideoPipeline) -> None:
    alone = [take(opened(pipe), 4), take(pipe.open(BLUE, seed=4, **OPTIONS), 4)]
    sessions, made = [opened(pipe), pipe.open(BLUE, seed=4, **OPTIONS)], ([], [])  # type: ignore[var-annotated]
    for number in (0, 1, 1, 0, 0, 1, 0, 1):
        made[number].append(sessions[number].step())
    assert same(made[0], alone[0])
    assert same(made[1], alone[1])


@pytest.mark.parametrize("recache", [True, False])
def test_a_new_prompt_holds_from_the_chunk_that_says_so(pipe: CausalVideoPipeline, recache: bool) -> None:
    ahead = pipe.parts.options.decode == "overlap"
    plain, session = take(opened(pipe), 7), opened(pipe)
    first = take(session, 3)
    assert session.set_prompt(BLUE, recache=recache) == 1
    later = take(session, 4)
    held = [chunk.prompt_id for chunk in later]
    assert held == ([0, 1, 1, 1] if ahead else [1, 1, 1, 1])
    before = 3 + held.count(0)
    assert same([*first, *later][:before], plain[:before])
    changed = np.abs(frames_of(later[-1:]).astype(int) - frames_of(plain[-1:])).mean()
    assert changed > 2, "the new prompt shows"
    assert [(p.prompt_id, p.first_chunk, p.prompt) for p in session.prompts] == [(0, 0, RED), (1, before, BLUE)]


def test_a_prompt_before_the_first_chunk_is_the_prompt(pipe: CausalVideoPipeline) -> None:
    session = pipe.open(BLUE, seed=3, **OPTIONS)
    session.set_prompt(RED)
    assert np.array_equal(frames_of(take(session, 3)), frames_of(take(opened(pipe), 3)))


def test_a_prompt_over_some_chunks_moves_in_equal_parts() -> None:
    pipe = CausalVideoPipeline.from_pretrained("toybox")
    session, by_hand = opened(pipe), opened(pipe)
    take(session, 2)
    session.set_prompt(BLUE, over_chunks=3)
    smooth = take(session, 4)
    made = take(by_hand, 2)
    red, blue = (pipe.text.encode(text, 3) for text in (RED, BLUE))
    for share in (1 / 3, 2 / 3, 1.0):
        by_hand.set_prompt(prompt_embeds=torch.lerp(red.double(), blue.double(), share).float())
        made += take(by_hand, 1)
    made += take(by_hand, 1)
    assert np.array_equal(frames_of(smooth), frames_of(made[2:]))
    assert {chunk.prompt_id for chunk in smooth} == {1}


def test_chunks_that_are_taken_back_come_again(pipe: CausalVideoPipeline) -> None:
    session = opened(pipe, history=4)
    chunks = take(session, 7)
    assert session.rewind(2)
    assert same(take(session, 2), chunks[5:])
    session.set_prompt(BLUE, recache=False)
    take(session, 1)
    assert session.rewind(2), "without a new cache a change of prompt is taken back too"
    assert session.prompts[-1].prompt == RED
    assert same(take(session, 1), chunks[6:])


def test_after_many_prompts_the_very_beginning_can_still_be_gone_back_to(pipe: CausalVideoPipeline) -> None:
    session = opened(pipe, kept_chunks=1)
    first = take(session, 2)
    for color in ("blue", "green", "yellow", "purple", "orange"):
        session.set_prompt(f"a {color} circle slides right")
        take(session, 2)
    assert session.rewind(12)
    assert [prompt.prompt for prompt in session.prompts] == [RED]
    assert same(take(session, 2), first)


def test_further_back_the_window_is_computed_anew(pipe: CausalVideoPipeline) -> None:
    session = opened(pipe)
    chunks = take(session, 6)
    assert not session.rewind(3)
    again = take(session, 3)
    assert [c.first_frame_index for c in again] == [c.first_frame_index for c in chunks[3:]]
    apart = np.abs(frames_of(again).astype(int) - frames_of(chunks[3:])).mean()
    assert 0 < apart < 3, "the same seed and text go on nearly the same"
    assert session.rewind(6), "the very beginning is as it was"
    assert same(take(session, 3), chunks[:3])


def test_a_fork_goes_its_own_way(pipe: CausalVideoPipeline) -> None:
    plain, session = take(opened(pipe), 6), opened(pipe, history=2)
    take(session, 3)
    twin, other = session.fork(), session.fork(seed=9)
    assert same(take(twin, 2), plain[3:5])
    different = take(other, 2)
    assert same(take(session, 3), plain[3:])
    assert not np.array_equal(different[-1].frames, plain[4].frames)  # type: ignore[arg-type]
    twin.close()
    assert same(take(other.fork(), 2), take(other, 2))


class Interruption(Exception):
    """What a caller's own callback raises."""


@pytest.mark.parametrize("at", [0, 1])
def test_a_callback_that_raises_leaves_the_session_where_it_was(pipe: CausalVideoPipeline, at: int) -> None:
    plain = take(opened(pipe), 4)
    armed = [2]

    def callback(_: Any, step: int, timestep: float, kwargs: dict[str, Any]) -> None:
        if kwargs["chunk"] in armed and step == at:
            armed.clear()
            raise Interruption

    session = opened(pipe, callback_on_step_end=callback)
    made = take(session, 2)
    with pytest.raises(Interruption):
        session.step()
    made += take(session, 2)
    assert same(made, plain)


def test_a_callback_cannot_call_its_session() -> None:
    pipe = CausalVideoPipeline.from_pretrained("toybox")
    sessions: list[Session] = []
    session = opened(pipe, callback_on_step_end=lambda *_: sessions[0].set_prompt(BLUE))
    sessions.append(session)
    with pytest.raises(ConfigError, match="a callback cannot call its session: call it between two chunks"):
        session.step()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: s.set_prompt("gibberish"), "gibberish"),
        (lambda s: s.set_prompt(), "give either a prompt or its embeddings"),
        (
            lambda s: s.set_prompt(RED, over_chunks=0),
            "over_chunks must be a whole number of at least 1 and at most 64, not 0",
        ),
        (lambda s: s.set_prompt(prompt_embeds=torch.zeros(1, 2, 3)), r"\(1, 2, 3\)"),
        (lambda s: s.rewind(3), "chunks must be at most 2, which were made, not 3"),
        (lambda s: s.rewind(0), "chunks must be a whole number of at least 1, not 0"),
        (lambda s: s.fork(seed=-1), "seed must be a whole number of at least 0"),
    ],
)
def test_a_call_that_fails_changes_nothing(pipe: CausalVideoPipeline, call: Any, message: str) -> None:
    session = opened(pipe)
    made = take(session, 2)
    with pytest.raises((ConfigError, PromptError), match=message):
        call(session)
    assert same([*made, *take(session, 2)], take(opened(pipe), 4))
    session.close()
    with pytest.raises(ConfigError, match="the session is closed"):
        call(session)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 3, "sink": 1}, r"window 3 is smaller than chunk \+ sink"),
        ({"history": -1}, "history must be a whole number of at least 0"),
        ({"kept_chunks": 2.5}, "kept_chunks must be a whole number"),
        ({"num_frames": 0}, "num_frames must be a whole number of at least 1, not 0"),
        ({"output_type": "latent"}, "a stream yields frames"),
    ],
)
def test_wrong_options_of_a_session_are_one_sentence(
    pipe: CausalVideoPipeline, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        opened(pipe, **options)


def test_a_call_needs_an_end(pipe: CausalVideoPipeline) -> None:
    with pytest.raises(ConfigError, match="num_frames must be given for a call, which returns a whole video"):
        pipe(RED, num_frames=None)


def test_a_session_that_redraws_a_video_goes_forwards_alone() -> None:
    pipe = CausalVideoPipeline.from_pretrained("toybox")
    video = list(np.random.default_rng(0).integers(0, 255, (30, 64, 64, 3), np.uint8))
    with opened(pipe, num_frames=81, video=video, strength=0.5) as session:
        session.step()
        for call, what in ((lambda: session.rewind(1), "taken back"), (session.fork, "forked")):
            with pytest.raises(ConfigError, match=f"redraws a video cannot be {what}: the video is read once"):
                call()
        session.set_prompt(BLUE)
        assert [chunk.prompt_id for chunk in session] == [1, 1]
        assert session.is_complete


def test_sessions_take_images_and_guidance(pipe: CausalVideoPipeline) -> None:
    image = np.full((64, 64, 3), 90, np.uint8)
    options: dict[str, Any] = {"image": image, "guidance_scale": 1.5, "negative_prompt": BLUE}
    stream = list(pipe.stream(RED, seed=3, num_frames=45, **OPTIONS, **options))
    session = opened(pipe, history=1, **options)
    made = take(session, 3)
    assert session.rewind(1)
    made[2:] = take(session, 1)
    assert same(made, stream[:3])


def test_a_chunk_within_a_change_over_chunks_comes_again(pipe: CausalVideoPipeline) -> None:
    session = opened(pipe, history=4)
    take(session, 3)
    session.set_prompt(BLUE, recache=False, over_chunks=4)
    chunks = take(session, 6)
    assert session.rewind(4)
    assert same(take(session, 4), chunks[2:])


def test_a_change_that_is_cut_short_leaves_the_prompt_before(
    pipe: CausalVideoPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = opened(pipe)
    take(session, 4)
    with monkeypatch.context() as patch:
        patch.setattr(GuidanceBranch, "recompute", failing_once(GuidanceBranch.recompute))
        with pytest.raises(Interruption):
            session.set_prompt(BLUE)
    assert [prompt.prompt for prompt in session.prompts] == [RED]
    assert {chunk.prompt_id for chunk in take(session, 3)} == {0}
    assert session.set_prompt(BLUE) == 1
    take(session, 2)
    with monkeypatch.context() as patch:
        patch.setattr(GuidanceBranch, "recompute", failing_once(GuidanceBranch.recompute))
        with pytest.raises(Interruption):
            session.rewind(3)
    assert [chunk.index for chunk in take(session, 2)] == [9, 10]


def failing_once(whole: Any) -> Any:
    """A function that fails at its first call."""
    calls: list[None] = []

    def call(*arguments: Any, **options: Any) -> Any:
        calls.append(None)
        if len(calls) == 1:
            raise Interruption
        return whole(*arguments, **options)

    return call


def test_a_callback_cannot_close_its_session_and_a_dropped_fork_leaves_no_thread() -> None:
    pipe = CausalVideoPipeline.from_pretrained("toybox", decode="overlap")
    sessions: list[Session] = []
    sessions.append(opened(pipe, callback_on_step_end=lambda *_: sessions[0].close()))
    with pytest.raises(ConfigError, match="a callback cannot call its session"):
        sessions[0].step()
    session = opened(pipe)
    session.step()
    before = threading.active_count()
    for _ in range(3):
        session.fork()
    deadline = time.monotonic() + 10
    while threading.active_count() > before and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.05)
    assert threading.active_count() <= before


def steered(pipe: CausalVideoPipeline, pause: float = 0.0) -> list[Any]:
    """Everything that can be done to a session, once."""
    session = pipe.open(RED, seed=3, history=2, guidance_scale=2.0, negative_prompt=BLUE, **OPTIONS)
    made, exact = take(session, 3), []
    time.sleep(pause)
    session.set_prompt(BLUE)
    made += take(session, 2)
    exact.append(session.rewind(1))
    fork = session.fork(seed=5)
    made += [*take(session, 1), *take(fork, 2), *take(session, 1)]
    exact.append(session.rewind(4))
    session.set_prompt("a green square bounces", recache=False, new_shot=True)
    made += take(session, 4)
    return [[(c.index, c.first_frame_index, c.prompt_id) for c in made], exact, [c.frames for c in made]]


def on_ranks(group: Any, device: str, strategy: str, decode: Any) -> list[Any]:
    torch.use_deterministic_algorithms(True)
    parallel = SequenceParallel(group, strategy, device)
    pipe = CausalVideoPipeline.from_pretrained("toybox", parallel=parallel, decode=decode)
    mine: list[Any] = steered(pipe, pause=0.3 * parallel.rank)
    ranks: list[Any] = [None] * group.size()
    all_gather_object(ranks, mine, group)
    return ranks


@pytest.mark.parametrize(
    ("ranks", "strategy", "decode"), [(2, "ulysses", "inline"), (3, "shard-kv", "spatial"), (2, "gather-kv", "spatial")]
)
def test_ranks_steer_together(pool: RankPool, ranks: int, strategy: str, decode: str) -> None:
    numbers, exact, frames = steered(CausalVideoPipeline.from_pretrained("toybox"))
    by_rank = pool.run(on_ranks, ranks, strategy, decode)
    assert all(rank[:2] == [numbers, exact] for rank in by_rank)
    assert all(part is None for rank in by_rank[1:] for part in rank[2])
    for mine, alone in zip(by_rank[0][2], frames, strict=True):
        assert np.abs(mine.astype(int) - alone).max() <= 2, "float32 on ranks, to rounding"


def failing_on_one_rank(group: Any, device: str, failing: int) -> list[Any]:
    """A callback that raises on one rank alone, a prompt that one rank has wrong, and one that another rank has not."""
    torch.use_deterministic_algorithms(True)
    parallel = SequenceParallel(group, device=device)
    pipe = CausalVideoPipeline.from_pretrained("toybox", parallel=parallel)
    mine, armed = parallel.rank == failing, [True]

    def callback(_: Any, step: int, timestep: float, kwargs: dict[str, Any]) -> None:
        if mine and armed and kwargs["chunk"] == 1 and step == 1:
            armed.clear()
            raise Interruption("the disk is full")

    session = opened(pipe, callback_on_step_end=callback)
    made, said = take(session, 1), []
    wrong: list[Any] = [
        lambda: session.step(),
        lambda: session.set_prompt("gibberish" if mine else BLUE),
        lambda: session.set_prompt("a green circle slides right" if mine else BLUE),
        lambda: session.rewind(9 if mine else 1),
        lambda: session.set_prompt(prompt_embeds=torch.zeros(1)) if mine else session.set_prompt(BLUE),
        lambda: session.step(),
    ]
    decode = LocalFrames.decode
    for number, call in enumerate(wrong):
        if mine and number == 5:
            LocalFrames.decode = failing_once(decode)  # type: ignore[method-assign]
        started = time.monotonic()
        try:
            call()
            said.append("nothing")
        except (Interruption, RankLostError, PromptError, ConfigError) as error:
            said.append(f"{type(error).__name__}: {error}")
        assert time.monotonic() - started < 10
    LocalFrames.decode = decode  # type: ignore[method-assign]
    made += take(session, 3)
    ranks: list[Any] = [None] * group.size()
    all_gather_object(ranks, (said, [c.frames for c in made]), group)
    return ranks


def differing(group: Any, device: str) -> list[Any]:
    """Options that only rank 1 has."""
    torch.use_deterministic_algorithms(True)
    parallel = SequenceParallel(group, device=device)
    pipe = CausalVideoPipeline.from_pretrained("toybox", parallel=parallel)
    mine, said, calls = parallel.rank == 1, [], list[int]()
    for name, value in (("history", 3), ("kept_chunks", 9), ("history", None)):
        try:
            opened(pipe, **{name: value} if mine else {})
            said.append("nothing")
        except ConfigError as error:
            said.append(str(error))
    options = {"callback_on_step_end": lambda *given: calls.append(given[1])} if mine else {}
    chunk = opened(pipe, **options).step()
    ranks: list[Any] = [None] * group.size()
    all_gather_object(ranks, (said, calls, chunk.first_frame_index), group)
    return ranks


def test_options_of_one_rank_alone_are_refused_and_its_callback_is_called(pool: RankPool) -> None:
    first, second = pool.run(differing, 2)
    assert "ranks differ in history" in first[0][0]
    assert "ranks differ in kept_chunks" in first[0][1]
    assert "history must be a whole number" in first[0][2]
    assert [text.removesuffix(" (on rank 1)") for text in first[0]] == second[0]
    assert (first[1], second[1]) == ([], [0, 1])


def test_an_error_of_one_rank_ends_the_call_on_all_and_the_session_goes_on(pool: RankPool) -> None:
    plain = [c.frames for c in take(opened(CausalVideoPipeline.from_pretrained("toybox")), 4)]
    first, second = pool.run(failing_on_one_rank, 2, 1)
    assert first[0][0] == "RankLostError: rank 1 raised Interruption: the disk is full"
    assert second[0][0] == "Interruption: the disk is full"
    assert all("gibberish" in said[1] for said in (first[0], second[0]))
    assert first[0][2].startswith("ConfigError: ranks")
    assert first[0][2] == second[0][2]
    assert first[0][3] == "ConfigError: chunks must be at most 1, which were made, not 9 (on rank 1)"
    assert second[0][3] == first[0][3].removesuffix(" (on rank 1)")
    assert first[0][4] == second[0][4]
    assert "ranks differ in changes its prompt" in first[0][4]
    assert [said[5].split(":")[0] for said in (first[0], second[0])] == ["RankLostError", "Interruption"]
    for mine, alone in zip(first[1], plain, strict=True):
        assert np.abs(mine.astype(int) - alone).max() <= 2
