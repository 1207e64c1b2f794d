"""What callers of a session do wrong: each is one error, at once, and the session stays where it was."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed import all_gather_object

from causalrope_sp import CausalVideoPipeline, ConfigError, SequenceParallel, VideoChunk
from causalrope_sp.distributed.launch import RankPool
from causalrope_sp.errors import RankLostError
from causalrope_sp.pipeline import conditioning
from tests.support.controlled import controlled_toybox, noise_control
from tests.support.watching import noted

RED = "a red circle slides right"
OPTIONS: dict[str, Any] = {"seed": 3, "num_inference_steps": 2, "window": 7, "sink": 1}
GRAY = np.full((64, 64, 3), 90, np.uint8)


@pytest.fixture(scope="module")
def pipe() -> CausalVideoPipeline:
    return CausalVideoPipeline.from_pretrained("toybox", device="cpu")


@pytest.mark.parametrize("options", [{}, {"image": GRAY}, {"video": [GRAY] * 9}], ids=["text", "image", "video"])
@pytest.mark.parametrize("call", ["open", "stream", "__call__"])
def test_a_size_that_does_not_fit_is_refused_before_anything_is_allocated(
    pipe: CausalVideoPipeline, monkeypatch: pytest.MonkeyPatch, call: str, options: dict[str, Any]
) -> None:
    made: list[Any] = []
    monkeypatch.setattr(type(pipe.text), "opening", noted(type(pipe.text).opening, lambda _, *size: made.append(size)))
    for name in ("read_picture", "read_video"):
        monkeypatch.setattr(conditioning, name, lambda *_: made.append("pixels"))
    frames = {} if call == "open" else {"num_frames": 9}
    with pytest.raises(ConfigError, match=r"this run needs .* GB on cpu"):
        getattr(pipe, call)(RED, height=2**24, width=2**24, **frames, **options)
    assert made == []


@pytest.mark.parametrize("decode", ["inline", "overlap"])
def test_a_stop_iteration_of_a_callback_does_not_end_the_video(decode: Any) -> None:
    pipe = CausalVideoPipeline.from_pretrained("toybox", device="cpu", decode=decode)
    armed = [1]

    def callback(_: Any, step: int, timestep: float, kwargs: dict[str, Any]) -> None:
        if kwargs["chunk"] in armed:
            armed.clear()
            next(iter(()))

    plain = [chunk.frames for chunk in pipe.stream(RED, num_frames=45, **OPTIONS)]
    made: list[VideoChunk] = []
    with pipe.open(RED, num_frames=45, callback_on_step_end=callback, **OPTIONS) as session:
        with pytest.raises(RuntimeError, match="a function of the caller raised StopIteration while a chunk was made"):
            made.extend(session)
        made.extend(session)
    assert len(made) == len(plain)
    for one, other in zip(made, plain, strict=True):
        assert np.array_equal(one.frames, other)  # type: ignore[arg-type]


def test_a_stop_iteration_of_a_control_does_not_end_the_video() -> None:
    pipe = controlled_toybox()
    controls = iter([noise_control])
    session = pipe.open(RED, control=lambda chunk: next(controls)(chunk), **OPTIONS)
    with pytest.raises(RuntimeError, match="raised StopIteration"):
        list(session)


def test_two_threads_that_call_a_session_at_once_are_one_sentence(pipe: CausalVideoPipeline) -> None:
    within, go_on = threading.Event(), threading.Event()

    def callback(*_: Any) -> None:
        within.set()
        assert go_on.wait(30)

    session = pipe.open(RED, callback_on_step_end=callback, **OPTIONS)
    made: list[Any] = []
    thread = threading.Thread(target=lambda: made.append(session.step()))
    thread.start()
    assert within.wait(30)
    calls = (session.step, session.close, lambda: session.set_prompt(RED), lambda: session.rewind(1), session.fork)
    for call in (*calls, lambda: session.save("never")):
        with pytest.raises(ConfigError, match="another thread is in a call of this session: let one thread at a time"):
            call()
    go_on.set()
    thread.join(30)
    assert made[0].index == 0
    assert session.step().index == 1
    plain = pipe.open(RED, **OPTIONS)
    assert np.array_equal(plain.step().frames, made[0].frames)  # type: ignore[arg-type]


def test_a_session_whose_newest_chunk_is_not_finite_is_not_saved(tmp_path: Path) -> None:
    pipe = CausalVideoPipeline.from_pretrained("toybox", device="cpu")
    session = pipe.open(RED, history=1, **OPTIONS)
    session.step()
    pipe.model.head.linear.bias.fill_(torch.nan)
    session.step()
    with pytest.raises(ConfigError, match="chunk 2 has latents that are not finite in float32"):
        session.save(tmp_path / "s")
    assert not (tmp_path / "s").exists()
    assert session.rewind(1)
    session.save(tmp_path / "s")
    assert (tmp_path / "s").exists()


def said(call: Any) -> str:
    """What a call raises."""
    started = time.monotonic()
    try:
        call()
    except (ConfigError, RankLostError, RuntimeError, ValueError) as error:
        assert time.monotonic() - started < 10
        return f"{type(error).__name__}: {error}"
    return "nothing"


def at_odds(group: Any, device: str) -> list[Any]:
    parallel = SequenceParallel(group, "gather-kv", device)
    pipe = CausalVideoPipeline.from_pretrained("toybox", parallel=parallel)
    mine = parallel.rank == 1
    embeds = pipe.text.encode(RED, 3)
    other = embeds.clone()
    other[0, 0, 0] += 1e-6
    session = pipe.open(prompt_embeds=embeds, **OPTIONS)
    session.step()
    everyone = parallel.everyone

    def raises(error: Exception) -> None:
        if mine:
            raise error

    def stops(*_: Any) -> None:
        if mine:
            raise StopIteration

    told = [
        said(lambda: pipe.open(prompt_embeds=other if mine else embeds, **OPTIONS)),
        said(lambda: pipe.open(prompt_embeds=other.to("meta") if mine else embeds, **OPTIONS)),
        said(lambda: session.set_prompt(prompt_embeds=other if mine else embeds)),
        said(lambda: everyone.run_collectively(lambda: everyone.run_collectively(lambda: raises(ConfigError("no"))))),
        said(lambda: everyone.run_collectively(lambda: everyone.run_collectively(lambda: raises(ValueError("no"))))),
        said(lambda: list(pipe.open(RED, callback_on_step_end=stops, **OPTIONS))),
    ]
    told.append(said(lambda: session.set_prompt(prompt_embeds=embeds)) + f", chunk {session.step().index}")
    ranks: list[Any] = [None] * group.size()
    all_gather_object(ranks, told, group)
    return ranks


def test_ranks_at_odds_raise_alike_and_go_on(pool: RankPool) -> None:
    first, second, third = pool.run(at_odds, 3)
    assert first[0].startswith("ConfigError: ranks differ in prompt_embeds: ")
    assert first[1].startswith("RankLostError: rank 1 raised ")
    assert first[2].startswith("ConfigError: ranks differ in changes its prompt: ")
    assert first[3] == "ConfigError: no (on rank 1)"
    assert first[4] == "RankLostError: rank 1 raised ValueError: no"
    assert first[5] == "RankLostError: rank 1 raised StopIteration: StopIteration"
    assert first[6] == "nothing, chunk 1"
    assert third == first
    assert (second[3], second[4]) == ("ConfigError: no", "ValueError: no")
    assert second[5] == "RuntimeError: a function of the caller raised StopIteration while a chunk was made"
    assert (second[0], second[2], second[6]) == (first[0], first[2], first[6])
