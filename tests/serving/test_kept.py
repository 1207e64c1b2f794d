"""Live sessions that are kept on disk: over a restart, a killed server, and from one server to another."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed

from causalrope_sp.pipeline.pipeline import CausalVideoPipeline
from causalrope_sp.serving.checkpoints import KEPT_S, Checkpoints
from causalrope_sp.serving.commands import Commands
from causalrope_sp.serving.engine import Engine
from causalrope_sp.serving.live import Ended, FlowLimits, Item, Keeping, LiveSession
from causalrope_sp.serving.live_state import Delivery
from causalrope_sp.serving.metrics import Metrics
from tests.support.controlled import controlled_toybox
from tests.support.servers import ONE_STEP, Viewer, running_server

RED, GREEN = "a large red circle slides right", "a large green circle slides right"
WORDS = ("--window", "7", *ONE_STEP)


@pytest.fixture(scope="module")
def pipe() -> CausalVideoPipeline:
    return CausalVideoPipeline.from_pretrained("toybox", num_inference_steps=1, window=7)


class Rig:
    """A server's sessions without its threads, in a folder that it shares with others."""

    def __init__(self, pipe: CausalVideoPipeline, folder: Path, cache: bool = True) -> None:
        self.engine, self.metrics = Engine(Commands(pipe), lambda error: None), Metrics(pipe.strategy, pipe.fps, 1)
        self.checkpoints = Checkpoints(folder, cache)
        self.keeping = Keeping(self.checkpoints, every_change=True)
        self.ended: list[LiveSession] = []

    def open(self, arguments: dict[str, Any], restored: Any = None) -> tuple[LiveSession, list[Item]]:
        limits, got = FlowLimits(16, 100), list[Item]()
        live = LiveSession(self.engine, limits, self.metrics, self.ended.append, arguments, self.keeping, restored)
        live.attach(got.append)
        return live, got

    def take(self, key: str) -> tuple[LiveSession, list[Item]]:
        found = self.checkpoints.take(key)
        assert found is not None
        return self.open(found[0], (key, found[1]))


@pytest.fixture
def rigs(pipe: CausalVideoPipeline, tmp_path: Path) -> Iterator[list[Rig]]:
    rigs = [Rig(pipe, tmp_path) for _ in range(2)]
    yield rigs
    for rig in rigs:
        rig.engine.commands.stop()


def frames_of(items: list[Item]) -> list[Any]:
    return [item.chunk.frames for item in items if isinstance(item, Delivery)]


def test_another_server_goes_on_bit_for_bit_with_all_that_was_not_played(
    rigs: list[Rig], pipe: CausalVideoPipeline
) -> None:
    first, got = rigs[0].open({"prompt": RED, "seed": 3})
    for _ in range(3):
        first.make_chunk()
    first.played(0)
    first.set_prompt({"prompt": GREEN})
    second, again = rigs[1].take(first.key)
    assert [item.sequence for item in again if isinstance(item, Delivery)] == [1, 2]
    second.make_chunk()
    with pipe.open(RED, seed=3) as alone:
        right = [alone.step().frames for _ in range(3)]
        alone.set_prompt(GREEN)
        right.append(alone.step().frames)
    for seen, expected in zip([*frames_of(got)[:1], *frames_of(again)], right, strict=True):
        assert np.array_equal(seen, expected)  # type: ignore[arg-type]
    assert second.prompts == [
        {"prompt_id": 0, "from_chunk": 0, "prompt": RED},
        {"prompt_id": 1, "from_chunk": 3, "prompt": GREEN},
    ]


def test_the_server_that_has_lost_a_session_ends_it_and_leaves_its_files(rigs: list[Rig], tmp_path: Path) -> None:
    first, got = rigs[0].open({"prompt": RED})
    first.make_chunk()
    second, again = rigs[1].take(first.key)
    assert rigs[0].checkpoints.is_taken(first.key)
    first.make_chunk()
    assert got[1:] == [Ended("replaced", "another server has taken the session over")]
    assert rigs[0].ended == [first]
    second.make_chunk()
    assert len(frames_of(again)) == 2
    second.close()
    assert list(tmp_path.iterdir()) == []


def test_pauses_and_seeks_are_kept_also_before_the_first_chunk(rigs: list[Rig]) -> None:
    first, _ = rigs[0].open({"prompt": RED, "seed": 5})
    first.set_prompt({"prompt": GREEN})
    first.pause(True)
    second, _ = rigs[1].take(first.key)
    assert [prompt["prompt"] for prompt in second.prompts] == [GREEN]
    assert not second.needs_chunk()
    second.pause(False)
    second.make_chunk()
    second.make_chunk()
    second.seek(1)
    third, again = rigs[0].take(first.key)
    assert (third.next_chunk, len(frames_of(again))) == (1, 1)
    third.seek(0)
    fourth, again = rigs[1].take(first.key)
    assert (fourth.next_chunk, again) == (0, [])


def test_a_control_is_kept_before_it_is_acknowledged(tmp_path: Path) -> None:
    rigs = [Rig(controlled_toybox(num_inference_steps=1, window=7), tmp_path) for _ in range(2)]
    values = [[float(number)] * 16 for number in range(4)]
    first, _ = rigs[0].open({"prompt": RED, "control": values[0]})
    first.set_control(values[1])
    second, _ = rigs[1].take(first.key)  # nothing was made of it yet
    second.make_chunk()
    second.set_control(values[2])
    first.set_control(values[3])  # its server has lost it
    found = rigs[0].checkpoints.take(first.key)
    assert found is not None
    assert (found[0]["control"], found[1].control, len(found[1].unplayed)) == (values[2], values[2], 1)


def test_without_keys_and_values_the_window_is_computed_anew(pipe: CausalVideoPipeline, tmp_path: Path) -> None:
    sizes = []
    for name, cache in (("with", True), ("without", False)):
        rig = Rig(pipe, tmp_path / name, cache)
        live, _ = rig.open({"prompt": RED})
        live.make_chunk()
        sizes.append(next((tmp_path / name).glob("*.safetensors")).stat().st_size)
        again, got = rig.take(live.key)
        again.make_chunk()
        assert len(frames_of(got)) == 2
        rig.engine.commands.stop()
    assert sizes[1] < sizes[0] / 4


def test_what_cannot_be_written_or_read_harms_nothing(
    rigs: list[Rig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    live, got = rigs[0].open({"prompt": RED})

    def fail(path: Path, data: bytes) -> None:
        raise OSError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", fail)
        live.make_chunk()
    assert len(frames_of(got)) == 1
    assert rigs[1].checkpoints.take("never was") is None
    pointer = next(tmp_path.glob("*.json"))
    for text in ("nonsense", "[]", "{}", json.dumps({"server": 1, "number": 7, "made": True})):
        pointer.write_text(text)
        assert rigs[1].checkpoints.take(live.key) is None
    assert live.key not in "".join(path.name for path in tmp_path.iterdir())


def test_what_nobody_has_taken_up_is_removed_in_time(tmp_path: Path) -> None:
    for name, age in (("new.json", 0), ("old.json", KEPT_S + 60)):
        (tmp_path / name).write_text("{}")
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    Checkpoints(tmp_path, True)
    assert [path.name for path in tmp_path.iterdir()] == ["new.json"]


def test_sigterm_tells_viewers_and_their_sessions_go_on_after_a_restart(tmp_path: Path) -> None:
    with running_server(tmp_path, *WORDS, ranks=2) as server, Viewer(server.socket_url) as viewer:
        key = viewer.ask("open", prompt=RED, media="jpeg")["session"]
        viewer.next_chunk()
        last = viewer.next_chunk()
        server.process.send_signal(signal.SIGTERM)
        ended = viewer.wait(lambda message: message["type"] == "ended")
        assert (ended["code"], ended["message"]) == ("stopped", "the server is stopping")
        with pytest.raises(ConnectionClosed) as closed:
            viewer.read_all()
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == 1012
        server.process.wait(60)
    assert "\n".join(server.log).count("Traceback") == 1, "torchrun prints one of its own, and no rank does"
    assert server.log[-1].endswith(f"Process {server.process.pid} got signal: 15")
    assert server.events("stopping")[0]["time"].endswith("+00:00")
    with running_server(tmp_path, *WORDS) as server, Viewer(server.socket_url) as viewer:
        viewer.chunks = []
        back = viewer.ask("open", session=key, played=last.head["sequence"], media="jpeg")
        assert [prompt["prompt"] for prompt in back["prompts"]] == [RED]
        assert viewer.next_chunk().head["sequence"] == last.head["sequence"] + 1
        viewer.ask("close")
        assert list((tmp_path / "live").iterdir()) == []


def test_a_killed_server_loses_no_chunk_that_a_viewer_has_seen(tmp_path: Path) -> None:
    words = (*WORDS, "--keep-every-change")
    with running_server(tmp_path, *words) as server, Viewer(server.socket_url) as viewer:
        key = viewer.ask("open", prompt=RED, seed=4, media="jpeg")["session"]
        seen = [viewer.next_chunk() for _ in range(3)]
        viewer.ask("prompt", prompt=GREEN)
        server.process.kill()
        server.process.wait(60)
    pipe = CausalVideoPipeline.from_pretrained("toybox", num_inference_steps=1, window=7)
    with (
        running_server(tmp_path, *words) as server,
        Viewer(server.socket_url) as viewer,
        pipe.open(RED, seed=4) as alone,
    ):
        back = viewer.ask("open", session=key, played=2, media="jpeg")
        seen += [viewer.next_chunk() for _ in range(3)]
        assert [chunk.head["sequence"] for chunk in seen] == list(range(6))
        for chunk in seen:
            if chunk.head["chunk"] == back["prompts"][-1]["from_chunk"]:
                alone.set_prompt(GREEN)
            right = alone.step().frames
            assert right is not None
            assert np.abs(chunk.frames.astype(int) - right).mean() < 4
