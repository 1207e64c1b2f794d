"""Viewers over WebRTC, by aiortc."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import httpx
import numpy as np
from aiortc import RTCConfiguration, RTCPeerConnection, RTCSessionDescription
from aiortc.mediastreams import MediaStreamError

PATIENCE_S = 60.0


class RtcViewer:
    """A connection to /v1/realtime/webrtc.

    Attributes:
        frames: what was shown so far: when (`time.perf_counter`), and the frame, uint8 (H, W, 3).
        heads: the messages about chunks so far.
        answer: the server's session description.
    """

    def __init__(self) -> None:
        self.peer = RTCPeerConnection(RTCConfiguration(iceServers=[]))
        self.peer.addTransceiver("video", direction="recvonly")
        self.channel = self.peer.createDataChannel("causalrope-sp")
        self.channel.on("message", self._heard)
        self.peer.on("track", self._watched)
        self.frames, self.heads = list[tuple[float, np.ndarray]](), list[dict[str, Any]]()
        self.answer = ""
        self._others: list[dict[str, Any]] = []
        self._number = 0

    async def connect(self, url: str) -> None:
        """Connects to a server, of whose page this is the address."""
        opened = asyncio.Event()
        self.channel.on("open", opened.set)
        await self.peer.setLocalDescription(await self.peer.createOffer())
        offer = {"type": self.peer.localDescription.type, "sdp": self.peer.localDescription.sdp}
        async with httpx.AsyncClient(timeout=PATIENCE_S) as client:
            answer = (await client.post(url + "v1/realtime/webrtc", json=offer)).raise_for_status().json()
        self.answer = answer["sdp"]
        await self.peer.setRemoteDescription(RTCSessionDescription(**answer))
        await asyncio.wait_for(opened.wait(), PATIENCE_S)

    async def ask(self, kind: str, **fields: Any) -> dict[str, Any]:
        """Sends a message and returns its answer."""
        self._number += 1
        number = self._number
        self.channel.send(json.dumps({"type": kind, "id": number, **fields}))
        return await self.wait(lambda message: message.get("id") == number)

    async def wait(self, fits: Any) -> dict[str, Any]:
        """Waits for a message that is no chunk."""
        found: list[dict[str, Any]] = []

        def look() -> bool:
            found[:] = [message for message in self._others if fits(message)]
            return bool(found)

        await self.until(look)
        self._others.remove(found[0])
        return found[0]

    async def until(self, holds: Any, seconds: float = PATIENCE_S) -> None:
        """Waits until something holds."""
        deadline = time.monotonic() + seconds
        while not holds():
            if time.monotonic() > deadline:
                raise TimeoutError(f"{len(self.frames)} frames, {len(self.heads)} chunks, {self._others}")
            await asyncio.sleep(0.005)

    def _heard(self, text: str) -> None:
        message = json.loads(text)
        (self.heads if message["type"] == "chunk" else self._others).append(message)

    def _watched(self, track: Any) -> None:
        self._watching = asyncio.ensure_future(self._watch(track))

    async def _watch(self, track: Any) -> None:
        with suppress(MediaStreamError):
            while True:
                frame = await track.recv()
                self.frames.append((time.perf_counter(), frame.to_ndarray(format="rgb24")))


@asynccontextmanager
async def rtc_viewer(url: str) -> AsyncIterator[RtcViewer]:
    """Connects a viewer to a server, of whose page this is the address."""
    viewer = RtcViewer()
    try:
        await viewer.connect(url)
        yield viewer
    finally:
        await viewer.peer.close()
