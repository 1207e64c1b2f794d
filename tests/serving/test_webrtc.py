"""A live session over WebRTC, with aiortc as the viewer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import httpx
import numpy as np
import pytest

from causalrope_sp.pipeline.pipeline import CausalVideoPipeline
from tests.support.rtc import RtcViewer, rtc_viewer
from tests.support.servers import ONE_STEP, RunningServer, mean_color, running_server

RED, GREEN = "a large red circle slides right", "a large green circle stays still"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with running_server(tmp_path_factory.mktemp("served"), "--window", "7", "--max-sessions", "1", *ONE_STEP) as server:
        yield server


def with_viewer(server: RunningServer, test: Callable[[RtcViewer], Coroutine[Any, Any, None]]) -> None:
    async def run() -> None:
        async with rtc_viewer(server.url) as viewer:
            await test(viewer)

    asyncio.run(run())
    deadline = time.monotonic() + 60
    while "causalrope_sessions 0.0" not in server.get("metrics").text:
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_frames_of_the_session_come_at_its_rate_and_no_faster(server: RunningServer) -> None:
    async def test(viewer: RtcViewer) -> None:
        assert {line.split()[4] for line in viewer.answer.splitlines() if line.startswith("a=candidate")} == {
            "127.0.0.1"
        }
        opened = await viewer.ask("open", prompt=RED, seed=5)
        assert (opened["fps"], opened["webrtc"]) == (16, True)
        viewer.channel.send('{"type": "played", "sequence": 1000000}')  # what was not shown was not played
        await viewer.until(lambda: len(viewer.frames) > 48)
        took = viewer.frames[48][0] - viewer.frames[0][0]
        assert took > 0.9 * 48 / 16
        made = sum(head["frames"] for head in viewer.heads)
        assert made <= len(viewer.frames) + 16 + 12 + 24  # the lead and a chunk, and frames on their way
        with CausalVideoPipeline.from_pretrained("toybox", num_inference_steps=1, window=7).open(RED, seed=5) as alone:
            first = alone.step().frames
        assert first is not None
        apart = [np.abs(frame.astype(int) - right).mean() for _, frame in viewer.frames[:3] for right in first]
        assert min(apart) < 12  # of what VP8 keeps at its first, low rate
        assert (await viewer.ask("close"))["type"] == "ack"

    with_viewer(server, test)


def test_a_prompt_a_pause_and_a_seek_are_seen(server: RunningServer) -> None:
    async def test(viewer: RtcViewer) -> None:
        await viewer.ask("open", prompt=RED)
        await viewer.until(lambda: len(viewer.frames) > 20)
        assert mean_color(viewer.frames[-1][1])[0] > mean_color(viewer.frames[-1][1])[1] + 50
        changed = await viewer.ask("prompt", prompt=GREEN)
        await viewer.until(lambda: viewer.heads and viewer.heads[-1]["prompt_id"] == changed["prompt_id"])
        await viewer.until(lambda: mean_color(viewer.frames[-1][1])[1] > mean_color(viewer.frames[-1][1])[0] + 50)
        await viewer.ask("pause")
        await asyncio.sleep(0.5)
        shown = len(viewer.frames)
        await asyncio.sleep(0.5)
        assert len(viewer.frames) == shown
        assert (await viewer.ask("seek", chunk=0))["type"] == "ack"
        await viewer.ask("resume")
        await viewer.until(lambda: mean_color(viewer.frames[-1][1])[0] > mean_color(viewer.frames[-1][1])[1] + 50)
        assert (await viewer.ask("open", prompt=RED))["code"] == "already_open"
        viewer.channel.send("{")
        assert (await viewer.wait(lambda message: message["type"] == "error"))["code"] == "wrong_message"
        assert (await viewer.ask("close"))["type"] == "ack"

    with_viewer(server, test)


def test_who_comes_back_goes_on(server: RunningServer) -> None:
    async def test() -> None:
        async with rtc_viewer(server.url) as viewer:
            assert (await viewer.ask("open", prompt=RED, media="mp4"))["code"] == "refused"
            opened = await viewer.ask("open", prompt=RED)
            await viewer.until(lambda: len(viewer.heads) > 1)
        async with rtc_viewer(server.url) as viewer:
            back = await viewer.ask("open", session=opened["session"])
            assert back["prompts"] == opened["prompts"]
            await viewer.until(lambda: viewer.heads and viewer.frames)
            await viewer.ask("close")

    asyncio.run(test())


def test_what_is_no_offer_is_refused(server: RunningServer) -> None:
    url = server.url + "v1/realtime/webrtc"
    sound = "v=0\r\no=- 1 1 IN IP4 0.0.0.0\r\ns=-\r\nt=0 0\r\nm=audio 9 UDP/TLS/RTP/SAVPF 0\r\nc=IN IP4 0.0.0.0\r\n"
    for body, status in (
        ({"type": "offer", "sdp": "nonsense"}, 400),
        ({"type": "offer", "sdp": sound}, 400),
        ({"type": "answer", "sdp": ""}, 422),
        ({"type": "offer", "sdp": "x" * 70_000}, 422),
    ):
        assert httpx.post(url, json=body, timeout=60).status_code == status
    refused = httpx.post(url, json={"type": "offer", "sdp": ""}, headers={"Origin": "http://other.org"}, timeout=60)
    assert refused.status_code == 403
