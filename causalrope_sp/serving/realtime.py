"""The WebSocket /v1/realtime: one connection of a viewer with a live session."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any

from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from causalrope_sp.serving.access import SUBPROTOCOL
from causalrope_sp.serving.conversation import Conversation, Gone
from causalrope_sp.serving.media import Media, check_media, encode

if TYPE_CHECKING:
    from causalrope_sp.serving.live_state import Delivery
    from causalrope_sp.serving.server import Server

CLOSED = 1000  # codes of RFC 6455
REFUSED = 1008
RESTARTS = 1012


class Connection:
    """A viewer's connection.

    Args:
        server: the server.
        socket: the WebSocket, not yet accepted.
    """

    def __init__(self, server: Server, socket: WebSocket) -> None:
        self._server, self._socket = server, socket
        self._media: Media = "mp4"
        self._conversation = Conversation(server, self)

    async def run(self) -> None:
        """Serves the connection to its end."""
        offered = self._socket.scope.get("subprotocols", [])
        await self._socket.accept(SUBPROTOCOL if SUBPROTOCOL in offered else None)
        code = REFUSED
        try:
            if await self._conversation.run():
                code = RESTARTS if self._conversation.ended == "stopped" else CLOSED
        finally:
            if self._socket.client_state != WebSocketState.DISCONNECTED:
                with contextlib.suppress(RuntimeError, WebSocketDisconnect):
                    await self._socket.close(code)

    def choose(self, media: Media | None) -> None:
        """Takes the format of the video."""
        media = media or "mp4"
        check_media(media, self._server.pipe.height, self._server.pipe.width)
        self._media = media

    async def receive(self) -> str | bytes:
        """Returns the next message of the viewer."""
        received = await self._socket.receive()
        if received["type"] == "websocket.disconnect":
            raise Gone
        text = received.get("text")
        return received.get("bytes") or b"" if text is None else text

    async def send(self, message: dict[str, Any]) -> None:
        """Sends a message."""
        try:
            await self._socket.send_json(message)
        except WebSocketDisconnect as error:
            raise Gone from error

    async def send_chunk(self, delivery: Delivery, head: dict[str, Any]) -> None:
        """Encodes and sends a chunk."""
        chunk = delivery.chunk
        assert chunk.frames is not None, "rank 0 has the frames"
        piece = await asyncio.to_thread(
            encode, chunk.frames, chunk.first_frame_index, self._server.pipe.fps, self._media
        )
        if delivery.dropped:
            return
        await self.send({**head, "mime": piece.mime, "header_bytes": piece.header_bytes, "parts": len(piece.parts)})
        for part in piece.parts:
            try:
                await self._socket.send_bytes(part)
            except WebSocketDisconnect as error:
                raise Gone from error
        await self._conversation.sent(delivery.sequence, played=False)
