"""A conversation, whatever carries it."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

from causalrope_sp.pipeline.pipeline import CausalVideoPipeline
from causalrope_sp.serving.conversation import Conversation, Gone
from causalrope_sp.serving.live_state import Delivery
from causalrope_sp.serving.media import Media
from causalrope_sp.serving.server import Server
from causalrope_sp.serving.server_options import ServerOptions

RED = "a large red circle slides right"


class Stuck:
    """Carries the messages that it is given, and takes no chunk before it is let."""

    def __init__(self, *messages: dict[str, Any]) -> None:
        self.messages = [json.dumps(message) for message in messages]
        self.told, self.begun = list[dict[str, Any]](), list[int]()
        self.free, self.gone = asyncio.Event(), asyncio.Event()
        self.conversation: Conversation

    def choose(self, media: Media | None) -> None:
        assert media is None

    async def receive(self) -> str | bytes:
        if self.messages:
            return self.messages.pop(0)
        await self.gone.wait()
        raise Gone

    async def send(self, message: dict[str, Any]) -> None:
        self.told.append(message)

    async def send_chunk(self, delivery: Delivery, head: dict[str, Any]) -> None:
        self.begun.append(head["chunk"])
        await self.free.wait()
        await self.conversation.sent(delivery.sequence, played=False)


class Leaving(Stuck):
    """A viewer that asks for the session's end and goes at once, while a chunk is sent to it."""

    async def send_chunk(self, delivery: Delivery, head: dict[str, Any]) -> None:
        self.begun.append(head["chunk"])
        raise Gone

    async def receive(self) -> str | bytes:
        while self.told and not self.begun:
            await asyncio.sleep(0.02)
        self.gone.set()
        return await super().receive()


def test_what_a_viewer_said_before_it_went_is_obeyed(tmp_path: Path) -> None:
    pipe = CausalVideoPipeline.from_pretrained("toybox", num_inference_steps=1, window=7)
    server = Server(pipe, "toybox", ServerOptions(folder=tmp_path), lambda error: None)

    async def run() -> None:
        leaving = Leaving({"type": "open", "prompt": RED}, {"type": "prompt", "prompt": RED}, {"type": "close"})
        assert await asyncio.wait_for(Conversation(server, leaving).run(), 60)
        assert [message["of"] for message in leaving.told] == ["open"], "nothing is sent to who has gone"

    server.engine.start()
    try:
        asyncio.run(run())
        assert "causalrope_sessions 0.0" in server.metrics.as_text().decode()
    finally:
        server.engine.stop()


def test_a_viewer_that_takes_nothing_lets_no_more_be_made_whatever_it_says(tmp_path: Path) -> None:
    pipe = CausalVideoPipeline.from_pretrained("toybox", num_inference_steps=1, window=7)
    server = Server(pipe, "toybox", ServerOptions(folder=tmp_path), lambda error: None)

    async def run() -> tuple[float, float]:
        stuck = Stuck({"type": "open", "prompt": RED}, *[{"type": "played", "sequence": 10**6}] * 9)
        stuck.conversation = Conversation(server, stuck)
        task = asyncio.create_task(stuck.conversation.run())
        async with asyncio.timeout(60):
            while made() < 9 + 12:
                await asyncio.sleep(0.05)
        await asyncio.sleep(1.5)
        before = made()
        assert stuck.begun == [0]
        stuck.free.set()  # and now what it says holds
        async with asyncio.timeout(60):
            while made() <= 100:
                await asyncio.sleep(0.05)
        stuck.gone.set()
        assert await task
        assert stuck.told[0]["type"] == "ack"
        return before, made()

    def made() -> float:
        text = server.metrics.as_text().decode()
        return next(float(line.split()[1]) for line in text.splitlines() if line.startswith("causalrope_frames_total"))

    server.engine.start()
    try:
        before, after = asyncio.run(run())
    finally:
        server.engine.stop()
    assert before == 9 + 12, "the lead of a second and a chunk"
    assert after > 100
