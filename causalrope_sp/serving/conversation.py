"""What a viewer and its live session say to each other, whatever carries it: a WebSocket or WebRTC."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import TYPE_CHECKING, Any, Protocol

from causalrope_sp.errors import CausalRopeError, ConfigError, PromptError, RankLostError, escaped_line
from causalrope_sp.serving.event_log import log_event
from causalrope_sp.serving.live import Ended, Item
from causalrope_sp.serving.live_state import Delivery
from causalrope_sp.serving.messages import LONGEST_MESSAGE, Message, Refused, WrongMessage, read_message

if TYPE_CHECKING:
    from causalrope_sp.serving.live import LiveSession
    from causalrope_sp.serving.media import Media
    from causalrope_sp.serving.server import Server

OPEN_WITHIN_S = 30.0

_log = logging.getLogger(__name__)


class Gone(Exception):
    """The viewer has gone."""


class Transport(Protocol):
    """Carries messages and video."""

    def choose(self, media: Media | None) -> None:
        """Takes the format of the video that the viewer has asked for, if any.

        Raises:
            ConfigError: it cannot be carried.
        """
        ...

    async def receive(self) -> str | bytes:
        """Returns the next message of the viewer.

        Raises:
            Gone: the viewer has gone.
        """
        ...

    async def send(self, message: dict[str, Any]) -> None:
        """Sends a message.

        Raises:
            Gone: the viewer has gone.
        """
        ...

    async def send_chunk(self, delivery: Delivery, head: dict[str, Any]) -> None:
        """Sends a chunk. Once it is sent, the transport calls `Conversation.sent`.

        Args:
            delivery: the chunk.
            head: what is said of it, to which the transport adds `mime`, `header_bytes` and `parts`.

        Raises:
            Gone: the viewer has gone.
        """
        ...


class Conversation:
    """A viewer's conversation.

    Args:
        server: the server.
        transport: what carries it.

    Attributes:
        ended: the code with which the server has ended the session; None if it has not.
    """

    def __init__(self, server: Server, transport: Transport) -> None:
        self._server, self._transport = server, transport
        self._items: asyncio.Queue[Item | dict[str, Any]] = asyncio.Queue()  # no more chunks than the session's lead
        self._live: LiveSession | None = None
        self._sent = self._played = self._told = -1
        self._loop = asyncio.get_running_loop()
        self.ended: str | None = None

    async def run(self) -> bool:
        """Opens a session and serves it to its end, or to that of the connection.

        Returns:
            Whether a session was opened in time.
        """
        tasks = []
        self._server.viewers += 1
        try:
            if not await self._open():
                return False
            tasks = [asyncio.create_task(self._receive()), asyncio.create_task(self._send())]
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            return True
        finally:
            for task in tasks:
                task.cancel()
            for result in await asyncio.gather(*tasks, return_exceptions=True):
                if isinstance(result, Exception) and not isinstance(result, Gone):
                    log_event(_log, "connection failed", level=logging.ERROR, error=repr(result))
            if self._live is not None:
                with contextlib.suppress(RankLostError, Refused):  # it has ended
                    await self._call(lambda live: live.detach(self._receiver))
            self._server.viewers -= 1

    async def _open(self) -> bool:
        """Answers messages until one opens a session. Returns whether one did in time."""
        until = self._loop.time() + OPEN_WITHIN_S
        with contextlib.suppress(TimeoutError, Gone):
            while self._live is None:
                async with asyncio.timeout_at(until):
                    text = await self._transport.receive()
                if (answer := await self._answer(text)) is not None:
                    await self._transport.send(answer)
        return self._live is not None

    async def _receive(self) -> None:
        while True:
            answer = await self._answer(await self._transport.receive())
            if answer is None:
                continue
            self._items.put_nowait(answer)
            await self._items.join()  # so that a client that does not read is not read from
            if answer.get("of") == "close" and answer["type"] == "ack":
                self._live = None
                return

    async def _send(self) -> None:
        """Sends items to the end of the session. A viewer who has gone gets none, and `_receive` still obeys what it
        said before, such as a "close", until it comes to the end too."""
        here = True
        while True:
            item = await self._items.get()
            try:
                if isinstance(item, Ended):
                    self.ended = item.code
                if here:
                    await self._send_item(item)
                if isinstance(item, Ended):
                    return
            except Gone:
                here = False
            finally:
                self._items.task_done()

    async def _send_item(self, item: Item | dict[str, Any]) -> None:
        if isinstance(item, Delivery):
            await self._send_chunk(item)
        elif isinstance(item, Ended):
            await self._transport.send({"type": "ended", "code": item.code, "message": item.reason})
        else:
            await self._transport.send(item)

    async def _send_chunk(self, delivery: Delivery) -> None:
        chunk = delivery.chunk
        if delivery.dropped or chunk.frames is None:
            return
        head = {
            "type": "chunk",
            "sequence": delivery.sequence,
            "chunk": chunk.index,
            "first_frame": chunk.first_frame_index,
            "frames": len(chunk.frames),
            "prompt_id": chunk.prompt_id,
            "timings": {name: round(seconds, 5) for name, seconds in vars(chunk.timings).items()},
        }
        await self._transport.send_chunk(delivery, head)

    async def sent(self, sequence: int, *, played: bool) -> None:
        """Notes that a chunk is sent.

        Args:
            sequence: of its delivery.
            played: whether the viewer has played it by then.
        """
        self._sent = sequence
        if played:
            self._played = max(self._played, sequence)
        with contextlib.suppress(RankLostError, Refused):  # the session has ended
            await self._note_played()

    async def _answer(self, text: str | bytes) -> dict[str, Any] | None:
        """Obeys a message. Returns the answer; None for a message without one."""
        of = number = None
        try:
            if isinstance(text, bytes):
                raise WrongMessage("a message must be a JSON object, not bytes")
            if len(text) > LONGEST_MESSAGE:
                raise WrongMessage(f"a message may have at most {LONGEST_MESSAGE} characters")
            message = read_message(text)
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
            self._played = max(self._played, fields["sequence"])
            await self._note_played()
            return None
        if kind == "save":
            return await self._server.save(self._live, **fields)
        if kind == "control":
            self._server.check_control(fields["values"])
        calls = {
            "control": lambda live: live.set_control(fields["values"]),
            "prompt": lambda live: live.set_prompt(dict(fields)),
            "pause": lambda live: live.pause(True),
            "resume": lambda live: live.pause(False),
            "seek": lambda live: live.seek(fields["chunk"]),
            "close": lambda live: live.close(),
        }
        done: dict[str, Any] = await self._call(calls[kind])
        return done

    async def _note_played(self) -> None:
        """Tells the session what was played. What was not sent yet counts only then, so that a viewer that reads
        nothing, whatever it says, lets no more be made than the session's lead."""
        played = min(self._played, self._sent)
        if played > self._told:
            self._told = played
            await self._call(lambda live: live.played(played))

    async def _open_session(self, fields: dict[str, Any]) -> dict[str, Any]:
        if self._live is not None:
            raise Refused("already_open", "a connection has one session: open another connection")
        self._transport.choose(fields.pop("media", None))
        self._live, state = await self._server.open(fields, self._receiver)
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


def _while_open(live: LiveSession, call: Any) -> Any:
    if live.has_ended:
        raise Refused("ended", "the session has ended")
    return call(live)
