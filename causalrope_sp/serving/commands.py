"""The calls that a server makes of its pipeline, and how the other ranks follow those of rank 0."""

from __future__ import annotations

import base64
import ctypes
import io
import json
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import numpy as np

from causalrope_sp.distributed.turns import Pause
from causalrope_sp.errors import CausalRopeError, RankLostError
from causalrope_sp.serving.live_control import ControlSize, HeldControl

if TYPE_CHECKING:
    from causalrope_sp.distributed import SequenceParallel
    from causalrope_sp.pipeline.output import VideoChunk
    from causalrope_sp.pipeline.pipeline import CausalVideoPipeline
    from causalrope_sp.pipeline.session import Session

STOP = "stop"


class CommandChannel:
    """Carries commands from rank 0 to the other ranks through the rendezvous store.

    A rank that waits for a command is in no collective, so that an idle server may stay idle for as long as it likes.

    Args:
        parallel: the ranks, of which there are several.
    """

    def __init__(self, parallel: SequenceParallel) -> None:
        self._board, self._rank, self._count = parallel.turns.board, parallel.rank, 0

    def announce(self, *command: Any) -> None:
        """Sends a command, which JSON can hold, to all other ranks, and waits for none of them."""
        text = json.dumps(command)
        for rank in self._board.others:
            self._board.put(self._key(rank), text)
        self._count += 1

    def hear(self) -> list[Any]:
        """Waits for the next command of rank 0.

        Raises:
            RankLostError: rank 0 has ended.
        """
        key, pause = self._key(self._rank), Pause()
        while not self._board.has([key]):
            if pause.is_due():
                notice = self._board.read(0)
                if notice is not None and notice.ended and not self._board.has([key]):
                    raise RankLostError(f"rank 0 {notice.ended}, and rank {self._rank} waits for its commands")
            pause.sleep()
        command: list[Any] = json.loads(self._board.texts([key])[0])
        self._board.remove(key)
        self._count += 1
        return command

    def _key(self, rank: int) -> str:
        return f"command/{self._count}/{rank}"


class SessionTable:
    """The sessions of this rank by number. Every rank runs the same commands in the same order.

    Args:
        pipe: the pipeline that opens them.
    """

    def __init__(self, pipe: CausalVideoPipeline) -> None:
        self._pipe, self._sessions = pipe, dict[int, "Session"]()
        self._control_size, self._controls = ControlSize.of(pipe), dict[int, HeldControl]()

    def run(self, operation: str, number: int, arguments: dict[str, Any]) -> Any:
        """Runs one command.

        Args:
            operation: "open", "control", or the name of a method of a session.
            number: of the session.
            arguments: keyword arguments, which JSON can hold. "open" takes those of `CausalVideoPipeline.open`, an
                image as a PNG in base64, or the `path` of a saved session, and the `control` that holds at first.
                "control" takes the `values` that hold from the next chunk on.

        Returns:
            What the method returns; for "open" the session, for "control" nothing.

        Raises:
            CausalRopeError: what the method raises. The session is as it was before.
        """
        if operation == "open":
            self._sessions[number] = self._open(number, **arguments)
            return self._sessions[number]
        if operation == "control":
            return self._controls[number].hold(**arguments)
        if operation == "close":
            self._controls.pop(number, None)
            self._sessions.pop(number).close()
            return return_freed_memory()
        return getattr(self._sessions[number], operation)(**arguments)

    def _open(
        self,
        number: int,
        path: str | None = None,
        image: str | None = None,
        control: list[float] | None = None,
        **arguments: Any,
    ) -> Session:
        held: HeldControl | None = None
        if self._control_size is not None:
            held = HeldControl(self._control_size, control)
        if path is not None:
            session = self._pipe.resume(path, control=held)
        else:
            session = self._pipe.open(image=None if image is None else png_pixels(image), control=held, **arguments)
        if held is not None:
            self._controls[number] = held
        return session

    def close_all(self) -> None:
        """Closes all sessions."""
        for number in list(self._sessions):
            self.run("close", number, {})


class Commands:
    """Runs commands on rank 0, after they were announced to the other ranks. One thread uses it.

    Args:
        pipe: the pipeline.
    """

    def __init__(self, pipe: CausalVideoPipeline) -> None:
        self.pipe = pipe
        self._table, self._numbers = SessionTable(pipe), 0
        self._channel = CommandChannel(pipe.parallel) if pipe.parallel.size > 1 else None

    def open(self, **arguments: Any) -> tuple[int, Session]:
        """Opens a session.

        Args:
            arguments: as `SessionTable.run` takes them.

        Returns:
            Its number and the session.
        """
        self._numbers += 1
        session: Session = self._run("open", self._numbers, arguments)
        return self._numbers, session

    def step(self, number: int) -> VideoChunk:
        """Makes the next chunk of a session."""
        chunk: VideoChunk = self._run("step", number, {})
        return chunk

    def call(self, operation: str, number: int, **arguments: Any) -> Any:
        """Calls a method of a session by name."""
        return self._run(operation, number, arguments)

    def stop(self) -> None:
        """Closes all sessions, and lets the other ranks end."""
        if self._channel is not None:
            self._channel.announce(STOP, 0, {})
        self._table.close_all()

    def _run(self, operation: str, number: int, arguments: dict[str, Any]) -> Any:
        if self._channel is not None:
            self._channel.announce(operation, number, arguments)
        return self._table.run(operation, number, arguments)


def follow(pipe: CausalVideoPipeline) -> None:
    """Runs the commands of rank 0 on another rank until rank 0 stops.

    Raises:
        RankLostError: rank 0 has ended without a word.
    """
    channel, table = CommandChannel(pipe.parallel), SessionTable(pipe)
    while True:
        operation, number, arguments = channel.hear()
        if operation == STOP:
            table.close_all()
            return
        with suppress(CausalRopeError, StopIteration):  # rank 0 raises the same, and tells its client
            table.run(operation, number, arguments)


def return_freed_memory() -> None:
    """Gives the heap that sessions have freed back to the system, where the C library is glibc. It keeps freed memory
    in pieces between what is in use, so that a server would grow by some 0.2 MB with each session of toybox."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def png_pixels(text: str) -> np.ndarray:
    """Decodes a PNG in base64 to uint8 (H, W, 3)."""
    from PIL import Image

    with Image.open(io.BytesIO(base64.b64decode(text)), formats=["PNG"]) as picture:
        return np.asarray(picture.convert("RGB"))
