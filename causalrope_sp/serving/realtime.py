"""The WebSocket /v1/realtime: one connection of a viewer with a live session."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import TYPE_CHECKING, Any

from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from causalrope_sp.errors import CausalRopeError, ConfigError, PromptError, RankLostError, escaped_line
from causalrope_sp.serving.access import SUBPROTOCOL
from causalrope_sp.serving.event_log import log_event
from causalrope_sp.serving.live import Ended, Item
from causalrope_sp.serving.live_state import Delivery
from causalrope_sp.serving.media import Media, check_media, encode
from causalrope_sp.serving.messages import Message, Refused, WrongMessage, read_message

if TYPE_CHECKING:
    from causalrope_sp.serving.live import LiveSession
    from causalrope_sp.serving.server import Server

OPEN_WITHIN_S = 30.0
CLOSED = 1000  # codes of RFC 6455
REFUSED = 1008
RESTARTS = 1012

_log = logging.getLogger(__name__)


class Connection:
    """A viewer's connection.

    Args:
        server: the server.
        socket: the WebSocket, not yet accepted.
    """

    def __init__(self, server: Server, socket: WebSocket) -> None:
        self._server, self._socket = server, socket
        self._items: asyncio.Queue[Item | dict[str, Any]] = asyncio.Queue()  # no more chunks than the session's lead
        self._live: LiveSession | None = None
        self._media: Media = "mp4"
        self._code = CLOSED
        self._loop = asyncio.get_running_loop()

    async def run(self) -> None:
        """Serves the connection to its end."""
        offered = self._socket.scope.get("subprotocols", [])
        await self._socket.accept(SUBPROTOCOL if SUBPROTOCOL in offered else None)
        tasks = []
        self._server.viewers += 1
        try:
            if not await self._open():
                return
            tasks = [asyncio.create_task(self._receive()), asyncio.create_task(self._send())]
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            for result in await asyncio.gather(*tasks, return_exceptions=True):
                if isinstance(result, Exception) and not isinstance(result, _GONE):
                    log_event(_log, "connection failed", level=logging.ERROR, error=repr(result))
            if self._live is not None:
                with contextlib.suppress(RankLostError, Refused):  # it has ended
                    await self._call(lambda live: live.detach(self._receiver))
            await self._close(self._code)
            self._server.viewers -= 1

    async def _open(self) -> bool:
        """Answers messages until one opens a session. Returns whether one did in time."""
        until = self._loop.time() + OPEN_WITHIN_S
        with contextlib.suppress(TimeoutError, *_GONE):
            while self._live is None:
                answer = await self._answer_next(until)
                if answer is not None:
                    await self._socket.send_json(answer)
        if self._live is None:
            await self._close(REFUSED)
            return False
        return True

    async def _receive(self) -> None:
        while True:
            answer = await self._answer_next()
            if answer is None:
                continue
            self._items.put_nowait(answer)
            await self._items.join()  # so that a client that does not read is not read from
            if answer.get("of") == "close" and answer["type"] == "ack":
                self._live = None
                return

    async def _send(self) -> None:
        while True:
            item = await self._items.get()
            try:
                if isinstance(item, Delivery):
                    await self._send_chunk(item)
                elif isinstance(item, Ended):
                    await self._socket.send_json({"type": "ended", "code": item.code, "message": item.reason})
                    self._code = RESTARTS if item.code == "stopped" else CLOSED
                    return
                else:
                    await self._socket.send_json(item)
            finally:
                self._items.task_done()

    async def _send_chunk(self, delivery: Delivery) -> None:
        chunk = delivery.chunk
        if delivery.dropped or chunk.frames is None:
            return
        piece = await asyncio.to_thread(
            encode, chunk.frames, chunk.first_frame_index, self._server.pipe.fps, self._media
        )
        if delivery.dropped:
            return
        timings = {name: round(seconds, 5) for name, seconds in vars(chunk.timings).items()}
        head = {
            "type": "chunk",
            "sequence": delivery.sequence,
            "chunk": chunk.index,
            "first_frame": chunk.first_frame_index,
            "frames": len(chunk.frames),
            "prompt_id": chunk.prompt_id,
            "timings": timings,
            "mime": piece.mime,
            "header_bytes": piece.header_bytes,
            "parts": len(piece.parts),
        }
        await self._socket.send_json(head)
        for part in piece.parts:
            await self._socket.send_bytes(part)

    async def _answer_next(self, until: float | None = None) -> dict[str, Any] | None:
        """Receives a message and obeys it. Returns the answer; None for a message without one.

        Args:
            until: when it must have come, on the loop's clock; None to wait for as long as it takes.
        """
        async with asyncio.timeout_at(until):
            received = await self._socket.receive()
        if received["type"] == "websocket.disconnect":
            raise WebSocketDisconnect(received.get("code", CLOSED))
        of = number = None
        try:
            if received.get("text") is None:
                raise WrongMessage("a message must be a JSON object, not bytes")
            message = read_message(received["text"])
            of, number = message.kind, message.id
            fields = await self._obey(message)
            return None if fields is None else {"type": "ack", "of": of, "id": number, **fields}
        except WrongMessage as error:
            of, number, code, sentence = error.kind, error.id, "wrong_message", str(error)
        except Refused as error:
            code, sentence = error.code, str(error)
        except CausalRopeError as error:
            code = "wrong_prompt" if isinstance(error, PromptError) else "refused"
            told = isinstance(error, PromptError | ConfigError)  # others name files
            sentence = str(error) if told else "the server cannot do that: see its log"
            if not told:
                log_event(_log, "message refused", of=of, error=type(error).__name__, message=str(error))
        except RankLostError:
            code, sentence = "stopped", "the server is stopping"
        self._server.metrics.refused.labels(code).inc()
        return {"type": "error", "of": of, "id": number, "code": code, "message": escaped_line(sentence)}

    async def _obey(self, message: Message) -> dict[str, Any] | None:
        """Does what a message asks for. Returns the fields of its acknowledgement; None for one without."""
        kind, fields = message.kind, message.fields
        if kind == "open":
            return await self._open_session(dict(fields))
        if self._live is None:
            raise Refused("not_open", "no session is open: send open first")
        if kind == "played":
            await self._call(lambda live: live.played(fields["sequence"]))
            return None
        if kind == "save":
            return await self._server.save(self._live, **fields)
        calls = {
            "prompt": lambda live: live.set_prompt(dict(fields)),
            "pause": lambda live: live.pause(True),
            "resume": lambda live: live.pause(False),
            "seek": lambda live: live.seek(fields["chunk"]),
            "close": lambda live: live.close(),
        }
        done: dict[str, Any] = await self._call(calls[kind])
        return done

    async def _open_session(self, fields: dict[str, Any]) -> dict[str, Any]:
        if self._live is not None:
            raise Refused("already_open", "a connection has one session: open another connection")
        media: Media = fields.pop("media", "mp4")
        check_media(media, self._server.pipe.height, self._server.pipe.width)
        self._live, state = await self._server.open(fields, self._receiver)
        self._media = media
        return {**self._server.facts, "session": self._live.key, **state}

    async def _call(self, call: Any) -> Any:
        """Calls a function of the session in the engine's thread."""
        live = self._live
        assert live is not None, "a session is open"
        return await self._server.call(lambda: _while_open(live, call))

    def _receiver(self, item: Item) -> None:
        """Takes what the session sends, in the engine's thread."""
        with contextlib.suppress(RuntimeError):  # the server's loop has ended
            self._loop.call_soon_threadsafe(self._items.put_nowait, item)

    async def _close(self, code: int) -> None:
        if self._socket.client_state != WebSocketState.DISCONNECTED:
            with contextlib.suppress(RuntimeError, *_GONE):
                await self._socket.close(code)


_GONE = (WebSocketDisconnect,)


def _while_open(live: LiveSession, call: Any) -> Any:
    if live.has_ended:
        raise Refused("ended", "the session has ended")
    return call(live)
