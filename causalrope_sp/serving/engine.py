"""The one thread of a server that calls its pipeline: it makes chunks for several sources in rotation."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Protocol, TypeVar

from causalrope_sp.errors import RankLostError
from causalrope_sp.serving.commands import Commands

T = TypeVar("T")
LOOK_S = 0.25  # between two looks whether a source has expired
STOPPING = "the server is stopping"


class Source(Protocol):
    """What the engine makes chunks for. The engine's thread alone calls it."""

    def needs_chunk(self) -> bool:
        """Whether a chunk should be made now."""
        ...

    def make_chunk(self) -> None:
        """Makes a chunk, and deals with all errors but those that end the engine."""
        ...

    def look(self) -> None:
        """Is called several times a second, for a source to end itself."""
        ...

    def keep(self) -> object:
        """Writes what a server needs to go on with the source later, because the engine stops."""
        ...

    def end(self, reason: str) -> None:
        """Ends the source, because the engine stops. Nothing can be called of the pipeline any more."""
        ...


class Engine:
    """Owns a pipeline in one thread. Calls come first, then one chunk of one source, the longest unserved one that
    needs any.

    Args:
        commands: the pipeline's calls.
        on_failure: called from the thread with the error that ended it, a lost rank.
    """

    def __init__(self, commands: Commands, on_failure: Callable[[BaseException], None]) -> None:
        self.commands, self._on_failure = commands, on_failure
        self._changed = threading.Condition()
        self._calls: deque[tuple[Future, Callable[[], object]]] = deque()
        self._sources: deque[Source] = deque()
        self._stopping = False
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def stop(self, wait_s: float = 60.0) -> None:
        """Ends all sources and the thread, after the chunk that is being made."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join(wait_s)

    @property
    def is_stopping(self) -> bool:
        """Whether it has been told to stop, or has failed."""
        return self._stopping

    def submit(self, call: Callable[[], T]) -> Future[T]:
        """Runs a function in the engine's thread, between two chunks.

        Args:
            call: the function.

        Returns:
            Its result to come. Once the engine has stopped, that is a RankLostError.
        """
        future: Future[T] = Future()
        with self._changed:
            if self._stopping:
                future.set_exception(RankLostError(STOPPING))
            else:
                self._calls.append((future, call))
                self._changed.notify()
        return future

    def add(self, source: Source) -> None:
        """Adds a source, which comes last in the rotation. The engine's thread calls it, or any before the start."""
        self._sources.append(source)

    def remove(self, source: Source) -> None:
        """Removes a source. The engine's thread calls it."""
        self._sources.remove(source)

    def _work(self) -> None:
        try:
            while not self._stopping:
                self._turn()
            for source in list(self._sources):
                source.keep()
            self._end(STOPPING)
            self.commands.stop()
        except BaseException as error:
            self._end("a rank of the server is lost" if isinstance(error, RankLostError) else "the server has failed")
            self._on_failure(error)

    def _end(self, reason: str) -> None:
        with self._changed:
            self._stopping = True
            calls, self._calls = self._calls, deque()
        for source in list(self._sources):
            source.end(reason)
        for future, _ in calls:
            if future.set_running_or_notify_cancel():
                future.set_exception(RankLostError(reason))

    def _turn(self) -> None:
        """Runs the calls that wait, then makes one chunk; waits for either."""
        for source in list(self._sources):
            source.look()
        source_in_need = next((source for source in self._sources if source.needs_chunk()), None)
        with self._changed:
            if source_in_need is None and not self._calls and not self._stopping:
                self._changed.wait(LOOK_S if self._sources else None)
            calls, self._calls = self._calls, deque()
        for future, call in calls:
            _answer(future, call)
        if source_in_need is None or self._stopping or source_in_need not in self._sources:
            return
        self._sources.remove(source_in_need)
        self._sources.append(source_in_need)
        if source_in_need.needs_chunk():  # a call may have paused it
            source_in_need.make_chunk()


def _answer(future: Future, call: Callable[[], object]) -> None:
    """Calls, and gives the future what comes of it. A lost rank ends the engine too."""
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(call())
    except Exception as error:
        future.set_exception(error)
        if isinstance(error, RankLostError):
            raise
