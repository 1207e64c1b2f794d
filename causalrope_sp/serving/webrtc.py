"""WebRTC: the video of a live session as a track, and its messages over a data channel.

A viewer posts an offer with a data channel and a wish for video, and gets the answer. The server shows the frames at
the model's own rate, and what it has shown counts as played.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections import deque
from contextlib import suppress
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Literal

import av
import numpy as np
from aiortc import (
    MediaStreamTrack,
    RTCConfiguration,
    RTCDataChannel,
    RTCPeerConnection,
    RTCSessionDescription,
)
from av.video.reformatter import VideoReformatter
from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException

from causalrope_sp.errors import ConfigError
from causalrope_sp.serving.conversation import OPEN_WITHIN_S, Conversation, Gone
from causalrope_sp.serving.event_log import log_event
from causalrope_sp.serving.live_state import Delivery
from causalrope_sp.serving.messages import LONGEST_MESSAGE

if TYPE_CHECKING:
    from causalrope_sp.serving.media import Media
    from causalrope_sp.serving.server import Server

CLOCK = 90_000  # of video in RTP, per second
MOST_WAITING = 64  # messages of a viewer that are not read yet
LOOK_S = 0.1  # between two looks whether a chunk was taken back before it was shown
MOST_PEERS = 4  # connections for each session that may be open

_log = logging.getLogger(__name__)


class Offer(BaseModel):
    """A session description of a viewer."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["offer"]
    sdp: str = Field(max_length=LONGEST_MESSAGE)


def webrtc_router(server: Server) -> APIRouter:
    """Makes the route by which viewers connect.

    Args:
        server: the server.
    """
    router, peers = APIRouter(), set[asyncio.Task[None]]()

    @router.post("/v1/realtime/webrtc")
    async def connect(offer: Offer) -> dict[str, str]:
        if len(peers) >= MOST_PEERS * server.options.max_sessions:
            raise HTTPException(429, "too many viewers are connected: try again later")
        peer = Peer(server)
        try:
            answer = await peer.answer(offer)
        except Exception as error:  # aiortc raises whatever its parser of descriptions meets
            log_event(_log, "offer refused", error=type(error).__name__, message=str(error))
            await peer.close()
            raise HTTPException(400, "sdp must offer a data channel and ask for one video") from error
        task = asyncio.create_task(peer.run())
        peers.add(task)
        task.add_done_callback(peers.discard)
        return answer

    return router


class FrameTrack(MediaStreamTrack):
    """Shows frames at a steady rate; while there are none the last one stays.

    Args:
        fps: frames per second.
    """

    kind = "video"

    def __init__(self, fps: float) -> None:
        super().__init__()
        self._fps, self._frames = fps, deque[np.ndarray]()
        self._changed, self._shown, self._going, self._due = asyncio.Event(), asyncio.Event(), asyncio.Event(), 0.0
        self._going.set()
        self._reformatter = VideoReformatter()  # an encoder makes one for every frame that is not in its format
        self._begun = time.monotonic()

    async def show(self, delivery: Delivery) -> None:
        """Shows the frames of a chunk, and returns when the last one is shown or they are taken back."""
        assert delivery.chunk.frames is not None, "rank 0 has the frames"
        self._frames.extend(delivery.chunk.frames)
        self._shown.clear()
        self._changed.set()
        while self._frames and not delivery.dropped:
            with suppress(TimeoutError):
                async with asyncio.timeout(LOOK_S):
                    await self._shown.wait()
        self._frames.clear()

    def pause(self, paused: bool) -> None:
        """Holds the last frame, or goes on."""
        if paused:
            self._going.clear()
        else:
            self._going.set()

    async def recv(self) -> av.VideoFrame:
        """Returns the next frame when it is due."""
        while True:
            await self._going.wait()
            await self._changed.wait()
            await asyncio.sleep(max(0.0, self._due - time.monotonic()))
            if self._frames and self._going.is_set():
                break
            if not self._frames:
                self._changed.clear()
        picture = av.VideoFrame.from_ndarray(self._frames.popleft(), format="rgb24")
        frame = self._reformatter.reformat(picture, format="yuv420p", threads=1)
        if not self._frames:
            self._shown.set()
        now = time.monotonic()
        self._due = max(now, self._due + 1 / self._fps)
        frame.pts, frame.time_base = round((now - self._begun) * CLOCK), Fraction(1, CLOCK)
        return frame


class Peer:
    """A viewer's connection.

    Args:
        server: the server.
    """

    def __init__(self, server: Server) -> None:
        self._server = server
        self._connection = RTCPeerConnection(RTCConfiguration(iceServers=[]))
        self._track = FrameTrack(server.pipe.fps)
        self._channel: asyncio.Future[RTCDataChannel] = asyncio.get_running_loop().create_future()
        self._conversation, self._shown = Conversation(server, self), asyncio.Queue[Delivery]()
        self._inbox: asyncio.Queue[str | bytes | None] = asyncio.Queue()  # None: the viewer has gone
        self._connection.on("datachannel", self._opened)
        self._connection.on("connectionstatechange", self._look)

    async def answer(self, offer: Offer) -> dict[str, str]:
        """Takes a viewer's offer and returns the answer."""
        connection = self._connection
        await connection.setRemoteDescription(RTCSessionDescription(offer.sdp, offer.type))
        videos = [each for each in connection.getTransceivers() if each.kind == "video"]
        if len(videos) != 1 or len(connection.getTransceivers()) != 1 or connection.sctp is None:
            raise ValueError("the description has something else than one video and a data channel")
        connection.addTrack(self._track)
        if self._server.options.is_loopback:
            _stay_on_loopback(connection)
        await connection.setLocalDescription(await connection.createAnswer())
        return {"type": connection.localDescription.type, "sdp": connection.localDescription.sdp}

    async def run(self) -> None:
        """Serves the connection to its end."""
        try:
            async with asyncio.timeout(OPEN_WITHIN_S):
                await self._channel
            showing = asyncio.create_task(self._show())
            try:
                await self._conversation.run()
            finally:
                showing.cancel()
            async with asyncio.timeout(1):  # for what is still on its way
                while self._channel.result().bufferedAmount:
                    await asyncio.sleep(0.02)
        except (TimeoutError, Gone):
            pass
        finally:
            await self.close()

    async def close(self) -> None:
        """Closes the connection."""
        self._track.stop()
        await self._connection.close()

    def choose(self, media: Media | None) -> None:
        """Refuses a format: the track's is in the session's description."""
        if media is not None:
            raise ConfigError("media is for a WebSocket: here the video is a track")
        if self._server.pipe.height % 2 or self._server.pipe.width % 2:
            raise ConfigError("frames with an odd side cannot be sent by WebRTC: open a WebSocket with media jpeg")

    async def receive(self) -> str | bytes:
        """Returns the next message of the viewer."""
        message = await self._inbox.get()
        if message is None:
            raise Gone
        return message

    async def send(self, message: dict[str, Any]) -> None:
        """Sends a message."""
        channel = self._channel.result()
        if channel.readyState != "open":
            raise Gone
        channel.send(json.dumps(message))
        if message["type"] == "ack" and message["of"] in ("open", "pause", "resume"):
            self._track.pause(message.get("paused", message["of"] == "pause"))

    async def send_chunk(self, delivery: Delivery, head: dict[str, Any]) -> None:
        """Announces a chunk, which is shown after those before it."""
        await self.send({**head, "mime": "video/rtp", "header_bytes": 0, "parts": 0})
        self._shown.put_nowait(delivery)

    async def _show(self) -> None:
        while True:
            delivery = await self._shown.get()
            await self._track.show(delivery)
            await self._conversation.sent(delivery.sequence, played=True)

    def _opened(self, channel: RTCDataChannel) -> None:
        if self._channel.done():
            channel.close()
            return
        channel.on("message", self._heard)
        channel.on("close", self._leave)
        self._channel.set_result(channel)

    def _heard(self, message: str | bytes) -> None:
        if self._inbox.qsize() < MOST_WAITING:
            self._inbox.put_nowait(message)
        else:
            self._leave()

    def _look(self) -> None:
        if self._connection.connectionState in ("failed", "closed"):
            self._leave()

    def _leave(self) -> None:
        self._inbox.put_nowait(None)


def _stay_on_loopback(connection: RTCPeerConnection) -> None:
    """Lets a connection listen on the loopback address alone, which aioice otherwise leaves out."""
    assert connection.sctp is not None, "the offer has a data channel"
    ice = connection.sctp.transport.transport.iceGatherer._connection
    gather = ice.get_component_candidates
    ice.get_component_candidates = lambda component, addresses: gather(component, ["127.0.0.1"])
