"""A live session: a stream that its viewer steers, no further ahead of its viewer than a bounded lead."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from causalrope_sp.errors import CausalRopeError, ConfigError, RankLostError
from causalrope_sp.serving.checkpoints import Checkpoints
from causalrope_sp.serving.event_log import log_event
from causalrope_sp.serving.live_state import Delivery, LiveState
from causalrope_sp.serving.metrics import Metrics

if TYPE_CHECKING:
    from causalrope_sp.serving.engine import Engine

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Ended:
    """The end of a session, as its viewer is told.

    Args:
        code: a word for programs.
        reason: a sentence.
    """

    code: str
    reason: str


Item = Delivery | Ended
Receiver = Callable[[Item], None]


@dataclass(frozen=True)
class FlowLimits:
    """How far a session may go without its viewer.

    Args:
        lead_frames: no chunk is begun while so many pixel frames are made and not yet played.
        grace_s: how long a session waits for its viewer to come back, in seconds.
    """

    lead_frames: float
    grace_s: float


@dataclass(frozen=True)
class Keeping:
    """Where sessions are kept for another server to go on with, and when.

    Args:
        checkpoints: where.
        every_change: whether they are after every chunk and every change, before the viewer learns of it; otherwise
            only when the server stops.
    """

    checkpoints: Checkpoints
    every_change: bool


class LiveSession:
    """An open session of the pipeline and the chunks that its viewer has not played yet. The engine's thread alone
    calls it.

    Args:
        engine: the engine.
        limits: how far it may go without its viewer.
        metrics: where it counts.
        on_end: called once it has ended.
        arguments: of `CausalVideoPipeline.open`, or `path` of a saved session.
        keeping: where it is kept for another server to go on with, and when; None for nowhere.
        restored: the key and the state of a session that was kept, for one to go on with.

    Attributes:
        key: the secret by which a viewer comes back.
        number: the session's number, for logs.
        session: the pipeline's session.

    Raises:
        CausalRopeError: the session cannot be opened.
    """

    def __init__(
        self,
        engine: Engine,
        limits: FlowLimits,
        metrics: Metrics,
        on_end: Callable[[LiveSession], None],
        arguments: dict[str, Any],
        keeping: Keeping | None = None,
        restored: tuple[str, LiveState] | None = None,
    ) -> None:
        self._engine, self._commands, self._limits, self._metrics = engine, engine.commands, limits, metrics
        self._on_end, self._keeping = on_end, keeping
        self.key, self._state = restored or (
            secrets.token_urlsafe(18),
            LiveState(arguments, control=arguments.get("control")),
        )
        opened = time.monotonic()
        self.number, self.session = self._commands.open(**arguments)
        self._opened: float | None = opened
        self.next_chunk = self.session.next_index
        self._receiver: Receiver | None = None
        self._left_at, self._ended = opened, False
        engine.add(self)
        self._keep_change()
        log_event(_log, "session opened" if restored is None else "session restored", session=self.number)

    @property
    def prompts(self) -> list[dict[str, Any]]:
        """The prompts so far, for JSON."""
        return [
            {"prompt_id": prompt.prompt_id, "from_chunk": prompt.first_chunk, "prompt": prompt.prompt}
            for prompt in self.session.prompts
        ]

    @property
    def has_ended(self) -> bool:
        """Whether nothing can be asked of it any more."""
        return self._ended

    @property
    def ahead(self) -> int:
        """Pixel frames that are made and not yet played."""
        return self._state.ahead

    def attach(self, receiver: Receiver) -> dict[str, Any]:
        """Sends all that was not played to a viewer, and what is made from now on. A former viewer gets an end.

        Returns:
            The session's state, for JSON.
        """
        if self._receiver is not None:
            self._receiver(Ended("replaced", "another connection has taken the session over"))
        self._receiver = receiver
        for delivery in self._state.unplayed:
            receiver(delivery)
        return {"from_chunk": self.next_chunk, "paused": self._state.paused, "prompts": self.prompts}

    def detach(self, receiver: Receiver) -> None:
        """Waits for the viewer to come back, unless another one has taken over."""
        if self._receiver == receiver:
            self._receiver, self._left_at = None, time.monotonic()
            log_event(_log, "viewer left", session=self.number)

    def played(self, sequence: int) -> None:
        """Notes that the viewer has played all deliveries up to this one."""
        self._state.played(sequence)

    def pause(self, paused: bool) -> dict[str, Any]:
        """Makes no more chunks until the viewer resumes, or makes them again."""
        self._state.paused = paused
        self._keep_change()
        return {"from_chunk": self.next_chunk}

    def set_prompt(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Changes the prompt of the following chunks.

        Args:
            arguments: of `Session.set_prompt`.

        Raises:
            CausalRopeError: the prompt is refused. The session goes on as before.
        """
        started = time.perf_counter()
        number = self._commands.call("set_prompt", self.number, **arguments)
        log_event(_log, "prompt changed", session=self.number, seconds=round(time.perf_counter() - started, 4))
        self._keep_change()
        return {"from_chunk": self.session.prompts[-1].first_chunk, "prompt_id": number}

    def set_control(self, values: list[float]) -> dict[str, Any]:
        """Changes the control of the following chunks.

        Args:
            values: as `ControlSize.check` lets them pass.
        """
        self._commands.call("control", self.number, values=values)
        self._state.control = values
        if self._keeping is not None and self._keeping.every_change:
            self._keeping.checkpoints.write_control(self.key, values)
        return {"from_chunk": self.next_chunk}

    def seek(self, chunk: int) -> dict[str, Any]:
        """Takes chunks back, so that the next one is `chunk`; drops those of them that are not played yet.

        Raises:
            CausalRopeError: the chunk has not been made, or the latents from which to go on are not kept any more.
        """
        if not 0 <= chunk < self.next_chunk:
            made = f"0 to {self.next_chunk - 1}" if self.next_chunk else "none yet"
            raise ConfigError(f"chunk must be one that was made, {made}, not {chunk}")
        exact = self._commands.call("rewind", self.number, chunks=self.next_chunk - chunk)
        self.next_chunk = chunk
        dropped = self._state.take_back(chunk)
        self._keep_change()
        return {"from_chunk": chunk, "exact": exact, "dropped_chunks": dropped, "prompts": self.prompts}

    def save(self, path: str, cache: bool) -> dict[str, Any]:
        """Writes the session to a file.

        Args:
            path: of the file.
            cache: whether keys and values are written too.

        Raises:
            CausalRopeError: the file cannot be written.
        """
        self._commands.call("save", self.number, path=path, cache=cache)
        return {"from_chunk": self.next_chunk}

    def close(self) -> dict[str, Any]:
        """Ends the session at its viewer's wish."""
        held = {"from_chunk": self.next_chunk}
        self._finish(None)
        return held

    def needs_chunk(self) -> bool:
        """Whether its viewer is there, has not paused, and has little left to play."""
        here = self._receiver is not None and not (self._state.paused or self._ended)
        return here and self.session.is_open and self.ahead < self._limits.lead_frames

    def make_chunk(self) -> None:
        """Makes the next chunk and sends it to the viewer; an error ends the session."""
        try:
            chunk = self._commands.step(self.number)
        except RankLostError:
            raise
        except Exception as error:
            reason = str(error) if isinstance(error, ConfigError) else "the next chunk could not be made"
            log_event(_log, "session failed", session=self.number, error=type(error).__name__, message=str(error))
            self._finish(Ended("failed", reason))
            return
        self.next_chunk = chunk.index + 1
        self._metrics.count_chunk(chunk, self._opened)
        self._opened = None
        delivery = self._state.add(chunk)
        if not self._keep_change():
            self.give_up()
        elif self._receiver is not None:
            self._receiver(delivery)

    def look(self) -> None:
        """Ends the session if its viewer has been away for too long."""
        if self._receiver is None and time.monotonic() - self._left_at > self._limits.grace_s:
            self._finish(Ended("expired", "the viewer did not come back in time"))

    def keep(self) -> bool:
        """Writes the session for another server to go on with. One that cannot be written goes on here as before.

        Returns:
            Whether no other server has taken it.
        """
        made, state = self.next_chunk > 0, self._state
        if self._keeping is None or not (made or "prompt" in state.opening):
            return True
        if not made:
            state.opening = {**state.opening, "prompt": self.session.prompts[-1].prompt}
        try:
            return self._keeping.checkpoints.write(self.key, state, made, self.save)
        except CausalRopeError as error:
            log_event(_log, "session not kept", session=self.number, message=str(error))
            return True

    def give_up(self) -> None:
        """Ends the session here, since another server has taken it."""
        self._finish(Ended("replaced", "another server has taken the session over"))

    def _keep_change(self) -> bool:
        return self._keeping is None or not self._keeping.every_change or self.keep()

    def end(self, reason: str) -> None:
        """Tells the viewer that the server stops."""
        self._ended = True
        if self._receiver is not None:
            self._receiver(Ended("stopped", reason))

    def _finish(self, ended: Ended | None) -> None:
        self._ended = True
        self._engine.remove(self)
        if ended is not None and self._receiver is not None:
            self._receiver(ended)
        self._receiver = None
        self._state.unplayed.clear()
        if self._keeping is not None:
            self._keeping.checkpoints.remove(self.key)
        try:
            self._commands.call("close", self.number)
        except CausalRopeError as error:
            log_event(_log, "session not closed", session=self.number, message=str(error))
        self._on_end(self)
        log_event(_log, "session closed", session=self.number, why="asked" if ended is None else ended.code)
