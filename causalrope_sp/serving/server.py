"""What the parts of a server share: the engine, the open sessions, the folder, and the facts about the model."""

from __future__ import annotations

import asyncio
import fcntl
import secrets
from collections.abc import Callable
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any, TypeVar

from causalrope_sp.errors import ConfigError, OutputError, first_line
from causalrope_sp.pipeline.pipeline import CausalVideoPipeline
from causalrope_sp.serving.checkpoints import Checkpoints
from causalrope_sp.serving.commands import Commands
from causalrope_sp.serving.engine import Engine
from causalrope_sp.serving.job_store import JobStore
from causalrope_sp.serving.jobs import JobRunner
from causalrope_sp.serving.live import FlowLimits, Keeping, LiveSession, Receiver
from causalrope_sp.serving.live_control import ControlSize
from causalrope_sp.serving.live_state import LiveState
from causalrope_sp.serving.messages import LONGEST_PROMPT, Refused
from causalrope_sp.serving.metrics import Metrics
from causalrope_sp.serving.server_options import ServerOptions
from causalrope_sp.toybox.prompts import BACKGROUNDS, COLORS, GRAMMAR, MOTIONS, SHAPES, parse_prompt
from causalrope_sp.toybox.toybox_text import ToyboxText

T = TypeVar("T")


class Server:
    """A server of one pipeline, on rank 0.

    Args:
        pipe: the pipeline.
        model: its name, as clients see it.
        options: of the server.
        on_failure: called from the engine's thread with the error that ended the engine.
        shared: whether other servers use the folder too; then there are no jobs.

    Attributes:
        pipe, options: as given.
        engine: the thread that calls the pipeline.
        metrics: the counters.
        jobs: the videos that were ordered; None in a shared folder.
        viewers: how many conversations there are.
        facts: about the model and the ranks, for JSON.

    Raises:
        OutputError: the folder cannot be made, or another server uses it.
    """

    def __init__(
        self,
        pipe: CausalVideoPipeline,
        model: str,
        options: ServerOptions,
        on_failure: Callable[[BaseException], None],
        shared: bool = False,
    ) -> None:
        self.pipe, self.options = pipe, options
        self.metrics = Metrics(pipe.strategy, pipe.fps, pipe.parallel.size)
        self.engine = Engine(Commands(pipe), on_failure)
        self.viewers = 0
        self._sessions: dict[str, LiveSession] = {}
        self._limits = FlowLimits(options.lead_seconds * pipe.fps, options.grace_seconds)
        self.saved = options.folder / "sessions"
        self._lock = _take_folder(options.folder, self.saved, shared)
        self._keeping = Keeping(Checkpoints(options.folder / "live", options.keep_cache), options.keep_every_change)
        jobs = None if shared else JobStore(options.folder / "jobs")
        self.jobs = None if jobs is None else JobRunner(self.engine, jobs, self.metrics)
        self._control_size = ControlSize.of(pipe)
        self.facts = {
            "model": model,
            "height": pipe.height,
            "width": pipe.width,
            "fps": pipe.fps,
            "ranks": pipe.parallel.size,
            "strategy": pipe.strategy,
            "webrtc": not shared and find_spec("aiortc") is not None,
            "lead_seconds": options.lead_seconds,
            "longest_prompt": LONGEST_PROMPT,
            "control": None if self._control_size is None else asdict(self._control_size),
            "grammar": _grammar(pipe),
        }

    async def call(self, call: Callable[[], T]) -> T:
        """Runs a function in the engine's thread, between two chunks, and returns its result."""
        return await asyncio.wrap_future(self.engine.submit(call))

    async def open(self, fields: dict[str, Any], receiver: Receiver) -> tuple[LiveSession, dict[str, Any]]:
        """Opens a session, or finds an open one, and attaches its viewer.

        Args:
            fields: of a message "open", checked.
            receiver: takes what the session sends.

        Returns:
            The session and its state, for JSON.

        Raises:
            Refused: there is no such session, or there are too many.
            CausalRopeError: the session cannot be opened.
        """
        if "session" in fields:
            return await self._come_back(fields["session"], fields.get("played"), receiver)
        if "control" in fields:
            self.check_control(fields["control"])
        if "saved" in fields:
            path = self._saved_path(fields.pop("saved"))
            if not path.is_file():
                raise Refused("not_saved", "there is no saved session of this name")
            arguments: dict[str, Any] = {**fields, "path": str(path)}
        else:
            arguments = {**fields, "history": self.options.history}
        return await self.call(lambda: _attached(self._opened(arguments), receiver))

    async def _come_back(self, key: str, played: int | None, receiver: Receiver) -> tuple[LiveSession, dict[str, Any]]:
        """Attaches a viewer to an open session, or to one that was kept, which is opened again."""

        def find() -> tuple[LiveSession, dict[str, Any]]:
            checkpoints, live = self._keeping.checkpoints, self._sessions.get(key)
            if live is not None and checkpoints.is_taken(key):  # its viewer was at another server in between
                live.give_up()
                live = None
            if live is None:
                self._check_room()
                if (kept := checkpoints.take(key)) is None:
                    raise Refused("no_session", "there is no session of this name: it has ended, or never was")
                live = self._opened(kept[0], (key, kept[1]))
            if played is not None and not live.has_ended:
                live.played(played)
            return _attached(live, receiver)

        return await self.call(find)

    def _opened(self, arguments: dict[str, Any], restored: tuple[str, LiveState] | None = None) -> LiveSession:
        """Opens a session, in the engine's thread."""
        self._check_room()
        live = LiveSession(self.engine, self._limits, self.metrics, self._forget, arguments, self._keeping, restored)
        self._sessions[live.key] = live
        self.metrics.sessions.set(len(self._sessions))
        return live

    def _check_room(self) -> None:
        most = self.options.max_sessions
        if len(self._sessions) >= most:
            raise Refused("too_many_sessions", f"{most} sessions are open, which is the most: try again later")

    async def save(self, live: LiveSession, cache: bool = True) -> dict[str, Any]:
        """Writes a session to the server's folder.

        Args:
            live: the session.
            cache: whether keys and values are written too.

        Returns:
            The name by which it can be opened, and the next chunk.

        Raises:
            Refused: the folder holds as many as it may, or the session cannot be saved.
        """
        if len(list(self.saved.glob("*.safetensors"))) >= self.options.max_saved:
            raise Refused("too_many_saved", f"{self.options.max_saved} sessions are saved, which is the most")
        name = secrets.token_hex(12)
        try:
            done = await self.call(lambda: live.save(str(self._saved_path(name)), cache))
        except OutputError as error:
            raise Refused("not_saved", "the session could not be written: see the server's log") from error
        return {"saved": name, **done}

    def remove_saved(self, name: str) -> bool:
        """Removes a saved session. Returns whether there was one.

        Args:
            name: letters and digits, as `save` returned it.
        """
        if not name.isalnum():
            return False
        try:
            self._saved_path(name).unlink()
        except FileNotFoundError:
            return False
        return True

    def check_prompt(self, prompt: str) -> None:
        """Raises PromptError for a prompt that the model's grammar lacks, before anything is made of it."""
        if self.facts["grammar"] is not None:
            parse_prompt(prompt)

    def check_control(self, values: list[float]) -> None:
        """Raises ConfigError for a control that the model does not take."""
        if self._control_size is None:
            raise ConfigError("control cannot be sent: the model takes none")
        self._control_size.check(values)

    def _saved_path(self, name: str) -> Path:
        return self.saved / f"{name}.safetensors"

    def _forget(self, live: LiveSession) -> None:
        self._sessions.pop(live.key, None)
        self.metrics.sessions.set(len(self._sessions))


def _take_folder(folder: Path, saved: Path, shared: bool) -> IO[bytes] | None:
    """Makes the server's folders, and locks them unless others share them; returns what holds the lock."""
    try:
        saved.mkdir(mode=0o700, parents=True, exist_ok=True)
        if shared:
            return None
        lock = open(folder / "lock", "ab")  # noqa: SIM115
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise OutputError(f"another server uses the folder {folder}: give this one another --folder") from None
    except OSError as error:
        raise OutputError(f"cannot use the folder {folder}: {first_line(error)}") from error
    return lock


def _attached(live: LiveSession, receiver: Receiver) -> tuple[LiveSession, dict[str, Any]]:
    if live.has_ended:
        raise Refused("no_session", "the session has just ended")
    return live, live.attach(receiver)


def _grammar(pipe: CausalVideoPipeline) -> dict[str, Any] | None:
    """What a prompt may be, if the text encoder knows a grammar."""
    if not isinstance(pipe.text, ToyboxText):
        return None
    words = {"colors": list(COLORS), "shapes": list(SHAPES), "motions": list(MOTIONS), "backgrounds": list(BACKGROUNDS)}
    return {"text": GRAMMAR, **words}
