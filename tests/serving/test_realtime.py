"""The WebSocket of a running server."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from websockets.exceptions import ConnectionClosed

from causalrope_sp.pipeline.pipeline import CausalVideoPipeline
from tests.support.nonsense import STEERING
from tests.support.servers import ONE_STEP, RunningServer, Viewer, mean_color, running_server

RED, GREEN = "a large red circle slides right", "a large green circle slides right"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    options = ("--max-sessions", "3", "--grace", "1", "--window", "7", *ONE_STEP)
    with running_server(tmp_path_factory.mktemp("served"), *options) as server:
        yield server


@pytest.fixture(autouse=True)
def _no_sessions(server: RunningServer) -> None:
    wait_until_freed(server)


def wait_until_freed(server: RunningServer) -> None:
    """Waits until no session is open."""
    deadline = time.monotonic() + 60
    while "causalrope_sessions 0.0" not in server.get("metrics").text:
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_viewer_sees_the_frames_of_a_session(server: RunningServer) -> None:
    pipe = CausalVideoPipeline.from_pretrained("toybox", num_inference_steps=1, window=7)
    for media in ("mp4", "jpeg"):
        with Viewer(server.socket_url) as viewer, pipe.open(RED, seed=5) as alone:
            opened = viewer.ask("open", prompt=RED, seed=5, media=media)
            assert (opened["width"], opened["fps"], opened["from_chunk"], opened["strategy"]) == (64, 16, 0, "single")
            for number in range(3):
                seen, right = viewer.next_chunk(), alone.step()
                assert (seen.head["chunk"], seen.head["first_frame"]) == (number, right.first_frame_index)
                assert right.frames is not None
                assert np.abs(seen.frames.astype(int) - right.frames).mean() < 4
            assert viewer.ask("close")["type"] == "ack"


def test_each_change_is_acknowledged_with_its_first_chunk(server: RunningServer) -> None:
    with Viewer(server.socket_url) as viewer:
        viewer.ask("open", prompt=RED, seed=1)
        red = viewer.next_chunk()
        paused = viewer.ask("pause")
        changed = viewer.ask("prompt", prompt=GREEN)
        assert changed["from_chunk"] == paused["from_chunk"]
        assert viewer.ask("resume")["from_chunk"] == paused["from_chunk"]
        later = [viewer.next_chunk() for _ in range(10)]
        for chunk in later:
            assert chunk.head["prompt_id"] == (chunk.head["chunk"] >= changed["from_chunk"])
        assert mean_color(red.frames)[0] > mean_color(red.frames)[1] + 50
        assert any(mean_color(chunk.frames)[1] > mean_color(chunk.frames)[0] + 50 for chunk in later)
        sought = viewer.ask("seek", chunk=1)
        viewer.chunks.clear()  # they were sent before the answer
        assert sought["from_chunk"] == 1
        assert [prompt["prompt"] for prompt in sought["prompts"]] == [RED]
        again = viewer.next_chunk()
        assert (again.head["chunk"], again.head["prompt_id"]) == (1, 0)


def test_a_viewer_that_does_not_play_stops_its_session_alone(server: RunningServer) -> None:
    with Viewer(server.socket_url) as slow, Viewer(server.socket_url) as other:
        slow.ask("open", prompt=RED)
        other.ask("open", prompt=GREEN)
        for _ in range(6):
            other.next_chunk()
        made = [slow.next_chunk(play=False).head["chunk"] for _ in range(2)]
        assert made == [0, 1]  # 9 and 12 frames, and the lead is 16
        with pytest.raises(TimeoutError):
            slow.socket.recv(1)
        slow.send("played", sequence=1)
        assert slow.next_chunk().head["chunk"] == 2


def test_who_comes_back_in_time_goes_on_and_who_does_not_is_freed(server: RunningServer) -> None:
    with Viewer(server.socket_url) as viewer:
        name = viewer.ask("open", prompt=RED)["session"]
        viewer.next_chunk()
        lost = viewer.next_chunk(play=False)
    with Viewer(server.socket_url) as viewer:
        back = viewer.ask("open", session=name)
        assert [prompt["prompt"] for prompt in back["prompts"]] == [RED]
        assert viewer.next_chunk().head["sequence"] == lost.head["sequence"]
        assert viewer.next_chunk().head["chunk"] == lost.head["chunk"] + 1
    wait_until_freed(server)
    with Viewer(server.socket_url) as viewer:
        assert viewer.ask("open", session=name)["code"] == "no_session"


def test_what_cannot_be_obeyed_is_answered_and_the_session_goes_on(server: RunningServer) -> None:
    with Viewer(server.socket_url) as viewer:
        assert viewer.ask("prompt", prompt=RED)["code"] == "not_open"
        viewer.socket.send("{")
        assert viewer.answer(None)["message"] == "a message must be a JSON object"
        viewer.socket.send(b"\x00\x01")
        assert viewer.answer(None)["message"] == "a message must be a JSON object, not bytes"
        wrong = viewer.ask("open", prompt="a pink circle slides right")
        assert (wrong["code"], "unknown word 'pink'" in wrong["message"]) == ("wrong_prompt", True)
        assert "counterclockwise" in wrong["message"]  # the grammar to its end
        assert viewer.ask("open", saved="0123abc")["code"] == "not_saved"
        viewer.ask("open", prompt=RED)
        assert viewer.ask("open", prompt=RED)["code"] == "already_open"
        viewer.next_chunk()
        assert viewer.ask("seek", chunk=10**6)["code"] == "refused"
        assert viewer.ask("prompt", prompt="a red")["code"] == "wrong_prompt"
        assert viewer.next_chunk().head["chunk"] == 1


def test_no_more_sessions_are_opened_than_allowed(server: RunningServer) -> None:
    viewers = [Viewer(server.socket_url) for _ in range(4)]
    try:
        answers = [viewer.__enter__().ask("open", prompt=RED) for viewer in viewers]
        assert [answer["type"] for answer in answers[:3]] == ["ack"] * 3
        assert answers[3]["code"] == "too_many_sessions"
        assert viewers[0].ask("close")["type"] == "ack"
        assert viewers[3].ask("open", prompt=RED)["type"] == "ack"
    finally:
        for viewer in viewers:
            viewer.__exit__()


def test_a_message_that_is_too_long_ends_its_connection(server: RunningServer) -> None:
    with Viewer(server.socket_url) as viewer:
        viewer.socket.send("x" * 70_000)
        with pytest.raises(ConnectionClosed) as closed:
            viewer.socket.recv(30)
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == 1009


def test_the_log_has_no_prompt_and_no_secret(server: RunningServer) -> None:
    with Viewer(server.socket_url) as viewer:
        name = viewer.ask("open", prompt=RED)["session"]
        viewer.ask("close")
    assert server.events("session opened")
    assert not [line for line in server.log if RED in line or name in line]


def test_ctrl_c_ends_the_server_and_its_viewers(tmp_path: Path) -> None:
    with running_server(tmp_path, *ONE_STEP) as server, Viewer(server.socket_url) as viewer:
        viewer.ask("open", prompt=RED)
        server.process.send_signal(2)
        with pytest.raises(ConnectionClosed):
            viewer.read_all()
        assert server.process.wait(60) == 130


@settings(max_examples=12)
@given(st.lists(STEERING | st.none() | st.text(max_size=20), max_size=12))
def test_any_messages_are_each_answered_and_the_session_goes_on(
    server: RunningServer, messages: list[dict[str, Any] | str | None]
) -> None:
    with Viewer(server.socket_url) as viewer:
        while (opened := viewer.ask("open", prompt=RED)).get("code") == "too_many_sessions":
            time.sleep(0.1)  # that of the example before is being closed
        assert opened["type"] == "ack"
        for message in messages:
            if message is None:
                time.sleep(0.1)  # a chunk may come in between
            elif isinstance(message, str):
                viewer.socket.send(message)
                assert viewer.answer(None)["code"] == "wrong_message"
            elif message["type"] != "played":
                viewer.ask(message["type"], **{k: v for k, v in message.items() if k != "type"})
            else:
                viewer.send("played", sequence=message["sequence"])
        assert viewer.ask("resume")["type"] == "ack"
        viewer.chunks.clear()
        viewer.send("played", sequence=10**6)
        viewer.next_chunk()
        assert viewer.ask("close")["type"] == "ack"
