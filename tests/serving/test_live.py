"""A live session: how far it goes without its viewer, and what the viewer gets."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from causalrope_sp.errors import ConfigError, PromptError
from causalrope_sp.pipeline.pipeline import CausalVideoPipeline
from causalrope_sp.serving.commands import Commands
from causalrope_sp.serving.engine import Engine
from causalrope_sp.serving.live import Ended, FlowLimits, Item, LiveSession
from causalrope_sp.serving.live_state import Delivery
from causalrope_sp.serving.metrics import Metrics

RED, BLUE = "a red circle slides right", "a blue square stays still"


@pytest.fixture(scope="module")
def pipe() -> CausalVideoPipeline:
    return CausalVideoPipeline.from_pretrained("toybox", num_inference_steps=1, window=7)


class Rig:
    """An engine that is not started: a test runs its rotation by itself."""

    def __init__(self, pipe: CausalVideoPipeline, lead_frames: float = 16, grace_s: float = 100) -> None:
        self.engine = Engine(Commands(pipe), lambda error: None)
        self.metrics = Metrics(pipe.strategy, pipe.fps, 1)
        self.limits = FlowLimits(lead_frames, grace_s)
        self.ended: list[LiveSession] = []

    def open(self, prompt: str = RED, seed: int = 3, **fields: Any) -> LiveSession:
        arguments = {"prompt": prompt, "seed": seed, **fields}
        return LiveSession(self.engine, self.limits, self.metrics, self.ended.append, arguments)

    def make(self, *lives: LiveSession) -> int:
        """Makes chunks in rotation as long as any session needs one, and returns how many."""
        made = 0
        while needy := [live for live in lives if live.needs_chunk()]:
            min(needy, key=lambda live: live.next_chunk).make_chunk()
            made += 1
            assert made < 100
        return made


@pytest.fixture
def rig(pipe: CausalVideoPipeline) -> Iterator[Rig]:
    rig = Rig(pipe)
    yield rig
    rig.engine.commands.stop()


def chunks_of(items: list[Item]) -> list[Delivery]:
    return [item for item in items if isinstance(item, Delivery)]


def test_no_more_is_made_than_the_lead_and_a_chunk(rig: Rig) -> None:
    live, got = rig.open(), list[Item]()
    assert rig.make(live) == 0  # nobody looks on
    live.attach(got.append)
    assert rig.make(live) == 2  # 9 frames, then 12: the lead is 16
    assert live.ahead == 21
    live.played(0)
    assert live.ahead == 12
    assert rig.make(live) == 1
    live.played(2)
    assert (live.ahead, rig.make(live)) == (0, 2)
    assert [item.chunk.index for item in chunks_of(got)] == [0, 1, 2, 3, 4]


def test_sessions_in_rotation_make_what_each_makes_alone(rig: Rig, pipe: CausalVideoPipeline) -> None:
    lives = [rig.open(RED, 3), rig.open(BLUE, 4)]
    got: list[list[Item]] = [[], []]
    for live, items in zip(lives, got, strict=True):
        live.attach(items.append)
    for _ in range(3):
        rig.make(*lives)
        for live in lives:
            live.played(10**6)
    for prompt, seed, items in ((RED, 3, got[0]), (BLUE, 4, got[1])):
        alone = pipe.open(prompt, seed=seed)
        for item in chunks_of(items):
            assert np.array_equal(item.chunk.frames, alone.step().frames)  # type: ignore[arg-type]
        alone.close()
    assert min(len(items) for items in got) >= 4


def test_a_viewer_that_comes_back_gets_what_it_has_not_played(rig: Rig) -> None:
    live, first, second = rig.open(), list[Item](), list[Item]()
    receiver = first.append
    live.attach(receiver)
    rig.make(live)
    live.played(0)
    live.detach(second.append)  # it is not the receiver
    assert live.needs_chunk()
    live.detach(receiver)
    assert rig.make(live) == 0
    live.look()
    assert rig.ended == []
    live.attach(second.append)
    assert [item.sequence for item in chunks_of(second)] == [1]
    assert rig.make(live) == 1
    assert [item.sequence for item in chunks_of(second)] == [1, 2]


def test_a_second_viewer_takes_over(rig: Rig) -> None:
    live, first, second = rig.open(), list[Item](), list[Item]()
    live.attach(first.append)
    live.attach(second.append)
    rig.make(live)
    assert [type(item) for item in first] == [Ended]
    assert len(chunks_of(second)) == 2


def test_a_session_ends_when_its_viewer_stays_away(rig: Rig) -> None:
    rig.limits = FlowLimits(16, 0.05)
    live = rig.open()
    time.sleep(0.06)
    live.look()
    assert rig.ended == [live]
    assert (live.has_ended, live.session.is_open) == (True, False)


def test_a_prompt_holds_from_the_chunk_that_is_named(rig: Rig) -> None:
    live, got = rig.open(), list[Item]()
    live.attach(got.append)
    rig.make(live)
    with pytest.raises(PromptError, match="unknown word 'pink'"):
        live.set_prompt({"prompt": "a pink circle slides right"})
    assert live.set_prompt({"prompt": BLUE, "recache": False}) == {"from_chunk": 2, "prompt_id": 1}
    live.played(10)
    rig.make(live)
    assert [item.chunk.prompt_id for item in chunks_of(got)] == [0, 0, 1, 1]
    assert live.prompts[1] == {"prompt_id": 1, "from_chunk": 2, "prompt": BLUE}


def test_a_pause_stops_and_a_seek_takes_back(rig: Rig) -> None:
    live, got = rig.open(history=4), list[Any]()
    live.attach(got.append)
    rig.make(live)
    assert live.pause(True) == {"from_chunk": 2}
    live.played(0)
    assert rig.make(live) == 0
    live.detach(got.append)
    del got[1:]
    assert live.attach(got.append)["paused"]
    live.pause(False)
    rig.make(live)
    before = [item.chunk.frames for item in chunks_of(got)]
    with pytest.raises(ConfigError, match="chunk must be one that was made, 0 to 2, not 3"):
        live.seek(3)
    sought = live.seek(1)
    assert (sought["from_chunk"], sought["exact"], sought["dropped_chunks"]) == (1, True, 2)
    assert [item.dropped for item in chunks_of(got)] == [False, True, True]
    rig.make(live)
    again = chunks_of(got)[3:]
    assert [item.chunk.index for item in again] == [1, 2]
    assert np.array_equal(again[0].chunk.frames, before[1])  # type: ignore[arg-type]


def test_an_error_in_a_chunk_ends_its_session_alone(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    live, other, got = rig.open(), rig.open(), list[Item]()
    live.attach(got.append)
    other.attach(lambda item: None)

    def fail() -> None:
        raise OSError("/secret/path is full")

    monkeypatch.setattr(live.session, "step", fail)
    rig.make(live)
    assert got == [Ended("failed", "the next chunk could not be made")]
    assert rig.ended == [live]
    assert rig.make(other) == 2


def test_chunks_are_counted(rig: Rig) -> None:
    live = rig.open()
    live.attach(lambda item: None)
    rig.make(live)
    text = rig.metrics.as_text().decode()
    assert "causalrope_frames_total 21.0" in text
    assert "causalrope_first_frame_seconds_count 1.0" in text
    assert "causalrope_chunk_seconds_count 2.0" in text
    assert "causalrope_fps 16.0" in text
    assert float(re.findall(r"^causalrope_chunk_fps (.+)$", text, re.MULTILINE)[0]) > 0
