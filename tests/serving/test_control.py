"""The control of live sessions: it holds from the chunk that its answer names, on every carrier and over a restart."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from causalrope_sp.errors import ConfigError
from causalrope_sp.pipeline.pipeline import CausalVideoPipeline
from causalrope_sp.serving.commands import Commands
from causalrope_sp.serving.live_control import ControlSize
from tests.support.controlled import circle_at, write_controlled_toybox
from tests.support.nonsense import JSON
from tests.support.rtc import rtc_viewer
from tests.support.servers import ONE_STEP, RunningServer, SeenChunk, Viewer, running_server

RED = "a large red circle slides right"
WORDS = ("--window", "7", "--max-sessions", "2", "--grace", "1", *ONE_STEP)
CHANNELS, WHOLE = 16, 16 * 8 * 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_controlled_toybox(tmp_path_factory.mktemp("controlled") / "model")


@pytest.fixture(scope="module")
def pipe(folder: Path) -> CausalVideoPipeline:
    return CausalVideoPipeline.from_pretrained(folder, num_inference_steps=1, window=7)


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with running_server(tmp_path_factory.mktemp("served"), "--model", str(folder), *WORDS) as server:
        yield server


def place(pipe: CausalVideoPipeline, x: float, y: float) -> list[float]:
    """The control of a circle at this place, the same in every latent frame."""
    values: list[float] = circle_at(pipe, x, y)[0, -1].flatten().tolist()
    return values


def as_tensor(values: list[float]) -> torch.Tensor:
    area = (8, 8) if len(values) == WHOLE else (1, 1)
    return torch.tensor(values).view(1, 1, CHANNELS, *area).expand(-1, 3, -1, -1, -1)


def check_seen(pipe: CausalVideoPipeline, seen: list[SeenChunk], controls: list[tuple[int, list[float]]]) -> None:
    """Fails unless each of these chunks is the one of a session under controls that each hold from a chunk on."""
    right = list[Any]()
    with pipe.open(RED, seed=5) as alone:
        for number in range(1 + max(chunk.head["chunk"] for chunk in seen)):
            held = [values for since, values in controls if since <= number][-1]
            right.append(alone.step(control=as_tensor(held)).frames)
    for chunk in seen:
        assert np.abs(chunk.frames.astype(int) - right[chunk.head["chunk"]]).mean() < 2  # JPEG loses 1.4


def steer(viewer: Viewer, values: list[float]) -> tuple[list[SeenChunk], int]:
    """Changes the control of a session after its first chunks, and pauses it; returns them, and what is answered."""
    seen = [viewer.next_chunk() for _ in range(2)]
    viewer.ask("pause")
    since = viewer.ask("control", values=values)["from_chunk"]
    assert since >= 2
    seen += viewer.chunks
    viewer.chunks.clear()
    return seen, since


def test_a_control_holds_from_the_chunk_that_its_answer_names(server: RunningServer, pipe: CausalVideoPipeline) -> None:
    first, second = place(pipe, 0.3, 0.3), [1.0] * CHANNELS
    with Viewer(server.socket_url) as viewer:
        opened = viewer.ask("open", prompt=RED, seed=5, media="jpeg", control=first)
        assert opened["control"] == {"channels": CHANNELS, "height": 8, "width": 8}
        seen, since = steer(viewer, second)
        viewer.ask("resume")
        viewer.send("played", sequence=seen[-1].head["sequence"])
        seen += [viewer.next_chunk() for _ in range(2)]
        assert seen[-1].head["chunk"] > since
        check_seen(pipe, seen, [(0, first), (since, second)])
        with pytest.raises(AssertionError):
            check_seen(pipe, seen, [(0, first)])
        assert viewer.ask("close")["type"] == "ack"


def test_what_is_sought_is_made_under_the_control_that_holds(server: RunningServer, pipe: CausalVideoPipeline) -> None:
    first, second = place(pipe, 0.3, 0.7), place(pipe, 0.7, 0.3)
    with Viewer(server.socket_url) as viewer:
        viewer.ask("open", prompt=RED, seed=5, media="jpeg", control=first)
        _, since = steer(viewer, second)
        assert viewer.ask("seek", chunk=since - 1)["exact"]
        viewer.ask("resume")
        again = viewer.next_chunk()
        assert again.head["chunk"] == since - 1
        check_seen(pipe, [again], [(0, first), (since - 1, second)])
        viewer.ask("close")


def test_no_control_is_zero_and_a_saved_session_is_opened_with_another(
    server: RunningServer, pipe: CausalVideoPipeline
) -> None:
    nothing, there = [0.0] * CHANNELS, place(pipe, 0.7, 0.4)
    with Viewer(server.socket_url) as viewer:
        viewer.ask("open", prompt=RED, seed=5, media="jpeg")
        check_seen(pipe, [viewer.next_chunk()], [(0, nothing)])
        saved = viewer.ask("save")
        viewer.ask("close")
    with Viewer(server.socket_url) as viewer:
        assert viewer.ask("open", saved=saved["saved"], media="jpeg", control=there)["type"] == "ack"
        check_seen(pipe, [viewer.next_chunk()], [(0, nothing), (saved["from_chunk"], there)])
        viewer.ask("close")


def test_the_control_holds_on_two_ranks_and_after_a_restart(
    folder: Path, pipe: CausalVideoPipeline, tmp_path: Path
) -> None:
    first, second = place(pipe, 0.3, 0.3), place(pipe, 0.7, 0.7)
    words = ("--model", str(folder), "--keep-every-change", *WORDS)
    with running_server(tmp_path, *words, ranks=2) as server, Viewer(server.socket_url) as viewer:
        opened = viewer.ask("open", prompt=RED, seed=5, media="jpeg", control=first)
        seen, since = steer(viewer, second)
        played = seen[-1].head["sequence"]
    with running_server(tmp_path, *words) as server, Viewer(server.socket_url) as viewer:
        assert viewer.ask("open", session=opened["session"], played=played, media="jpeg")["from_chunk"] == since
        viewer.ask("resume")
        seen.append(viewer.next_chunk())
        assert seen[-1].head["chunk"] == since
        check_seen(pipe, seen, [(0, first), (since, second)])
        viewer.ask("close")


def test_a_data_channel_carries_it_too(server: RunningServer) -> None:
    async def run() -> None:
        async with rtc_viewer(server.url) as viewer:
            opened = await viewer.ask("open", prompt=RED, control=[0.25] * CHANNELS)
            assert opened["control"]["channels"] == CHANNELS
            await viewer.until(lambda: len(viewer.heads) > 0)
            changed = await viewer.ask("control", values=[-0.5] * WHOLE)
            assert changed["type"] == "ack"
            assert changed["from_chunk"] >= 1
            assert (await viewer.ask("control", values=[1.0] * 3))["code"] == "refused"
            await viewer.until(lambda: viewer.heads[-1]["chunk"] >= changed["from_chunk"])
            await viewer.ask("close")

    asyncio.run(run())


def test_a_wrong_control_is_one_sentence_and_the_session_goes_on(server: RunningServer) -> None:
    with Viewer(server.socket_url) as viewer:
        for code, opening in (("refused", [1.0]), ("wrong_message", "left"), ("wrong_message", [float("nan")])):
            assert viewer.ask("open", prompt=RED, control=opening)["code"] == code
        viewer.ask("open", prompt=RED)
        answer = viewer.ask("control", values=[1.0] * 17)
        assert answer["code"] == "refused"
        assert answer["message"] == (
            "control must be 16 numbers, one a channel, or 1024 numbers of 16 channels, 8 rows and 8 columns, "
            "not 17 numbers"
        )
        assert viewer.next_chunk().head["chunk"] == 0
        viewer.ask("close")


def test_a_model_without_control_refuses_it_in_one_sentence(tmp_path: Path) -> None:
    with running_server(tmp_path, *ONE_STEP) as server, Viewer(server.socket_url) as viewer:
        assert (
            viewer.ask("open", prompt=RED, control=[0.0])["message"] == "control cannot be sent: the model takes none"
        )
        assert viewer.ask("open", prompt=RED)["control"] is None
        refused = viewer.ask("control", values=[0.0])
        assert (refused["code"], refused["message"]) == ("refused", "control cannot be sent: the model takes none")
        assert viewer.next_chunk().head["chunk"] == 0


@settings(max_examples=10)
@given(st.lists(st.lists(st.floats() | st.integers(), max_size=17) | st.just([0.5] * CHANNELS) | JSON, max_size=9))
def test_any_control_is_answered_and_the_session_goes_on(server: RunningServer, controls: list[Any]) -> None:
    with Viewer(server.socket_url) as viewer:
        while (opened := viewer.ask("open", prompt=RED)).get("code") == "too_many_sessions":
            time.sleep(0.1)  # that of the example before is being closed
        assert opened["type"] == "ack"
        for values in controls:
            answer = viewer.ask("control", values=values)
            assert answer["type"] == "ack" or answer["code"] in ("wrong_message", "refused")
        viewer.send("played", sequence=10**6)
        assert viewer.next_chunk().head["frames"] > 0
        assert viewer.ask("close")["type"] == "ack"


def test_chunks_that_are_made_ahead_cannot_be_controlled(folder: Path) -> None:
    ahead = CausalVideoPipeline.from_pretrained(folder, decode="overlap")
    with pytest.raises(ConfigError, match="decode must be inline or spatial to serve a model that takes a control"):
        Commands(ahead)


def test_the_control_of_an_image_is_not_a_viewers(pipe: CausalVideoPipeline) -> None:
    assert ControlSize.of(pipe) == ControlSize(CHANNELS, 8, 8)
    pipe = CausalVideoPipeline.from_pretrained("toybox")
    pipe.model = pipe.model.with_control(4 + CHANNELS)
    assert ControlSize.of(pipe) is None
