"""The order in which ranks make the calls that use collectives.

Ranks that make different calls, or the same calls in another order, would mix up their collectives. So every such call
begins with a turn: the ranks tell each other through the rendezvous store what they are about to do, and go on if all
do the same. Between two turns a rank may pause for as long as its caller likes. Nothing is agreed upon in one process.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from causalrope_sp.distributed.notices import DONE, Failure, Notice, NoticeBoard, raised
from causalrope_sp.errors import ConfigError, RankLostError

SHORTEST_S, LONGEST_S, SHARE = 0.0005, 0.05, 0.05  # between two looks: a share of the time waited so far
LOOK_S = 0.25  # between two looks at the notices of ranks that have not come


@dataclass(frozen=True)
class Turn:
    """A call that all ranks have agreed on.

    Args:
        number: the number of the turn, from 1 on.
        stream, chunk: the chunk that it makes; None for another call.
    """

    number: int
    stream: int | None = None
    chunk: int = 0


class Turns:
    """The turns of one rank.

    Args:
        board: the notices of all ranks; None for one process.
        rank: this rank.
        started: returns how many collectives this rank has started.

    Attributes:
        number: the number of the last turn.
        open: the turn that is not over yet.
        ahead: the open stream that works ahead, so that no other call may come in between.
        stops: functions that end the work ahead and wait for its end.
    """

    def __init__(self, board: NoticeBoard | None, rank: int, started: Callable[[], int]) -> None:
        self._board, self.rank, self._started = board, rank, started
        self.number = self._streams = 0
        self._kept: list[tuple[str, frozenset[int]]] = []  # keys of turns, each with the ranks that may still read it
        self._lock = threading.Lock()
        self._thread: int | None = None  # the one that has the turn
        self.open: Turn | None = None
        self.ahead: int | None = None
        self.stops: set[Callable[[], None]] = set()
        self._closed = False
        self._cut: str | None = None  # how this rank left a call in the middle of its collectives

    @property
    def board(self) -> NoticeBoard:
        """The notices of all ranks, of which there are several."""
        assert self._board is not None, "one process has no other ranks"
        return self._board

    @contextmanager
    def take(self, call: str, ranks: Sequence[int], stream: int | None = None, chunk: int = 0) -> Iterator[None]:
        """Runs the body as soon as all ranks are about to make the same call.

        Args:
            call: what this rank is about to do, in words that follow its name.
            ranks: the ranks that make the call, this one included.
            stream, chunk: the chunk that the call makes.

        Raises:
            ConfigError: the ranks are about to make different calls, another stream works ahead, the call is made
                within another one, or the group is closed. No rank has begun.
            RankLostError: a rank has ended or failed, and will not come, or this one was interrupted before.
        """
        if self._closed:
            raise ConfigError(f"rank {self.rank} {DONE}: make another one, and its pipeline")
        if self._board is None:
            yield
            return
        if self._cut is not None:
            raise RankLostError(self._cut)
        with self._alone(stream):
            number = self.number = self.number + 1
            self._meet(self._board, number, call, ranks, stream, chunk)
            with self._failing(self._board, Turn(number, stream, chunk), call):
                yield

    def close(self) -> None:
        """Ends the work ahead. No turn can be taken any more."""
        for stop in list(self.stops):
            stop()
        self._closed = True

    @contextmanager
    def follow(self, stream: int, chunk: int) -> Iterator[None]:
        """Runs the body as part of the turn that other ranks have taken, on a rank that only decodes."""
        with self._failing(self.board, Turn(self.number, stream, chunk), "decodes a chunk"):
            yield

    def new_stream(self) -> int:
        """Returns the number of a new stream, from 1 on. All ranks open it in the same turn, so that they agree."""
        self._streams += 1
        return self._streams

    @contextmanager
    def leaving(self, stream: int, next_chunk: Callable[[], int], ahead: bool) -> Iterator[None]:
        """Tells the other ranks if the body, which takes the chunks of a stream, is left before its end.

        Args:
            stream: the stream's number.
            next_chunk: returns the first chunk that was not taken.
            ahead: whether a thread works ahead, so that no other call may come in between.
        """
        if self._board is None:
            yield
            return
        self._check_ahead(stream)
        self.ahead = stream if ahead else self.ahead
        try:
            yield
        except BaseException as error:
            chunk, closed = next_chunk(), isinstance(error, GeneratorExit)
            how = f"has closed stream {stream} before" if closed else f"{raised(error)}, in"
            self._board.leave(stream, chunk, f"{how} chunk {chunk}")
            raise
        finally:
            self.ahead = None if self.ahead == stream else self.ahead

    def hopeless(self, rank: int, notice: Notice) -> str | None:
        """Returns a line that says why this rank's open turn can never end; None if it can. Any thread may call it.

        A rank that failed in this very turn may have raised what this rank is about to raise: the caller must see that
        this rank does not get any further, and has started more collectives than the other one.
        """
        turn = self.open
        if turn is None:
            return None
        left = None if turn.stream is None else notice.left.get(turn.stream)
        failed = notice.failure is not None and notice.failure.turn == turn.number
        if left is not None and left[0] <= turn.chunk and not failed:
            return f"rank {rank} {left[1]}, and rank {self.rank} waits for it in chunk {turn.chunk}"
        if notice.failure is not None and failed:
            return f"rank {rank} {notice.failure.why}"
        return None

    @contextmanager
    def _alone(self, stream: int | None) -> Iterator[None]:
        """Lets one thread have the turn."""
        self._check_ahead(stream)
        if self._thread == threading.get_ident():
            raise ConfigError("a callback cannot call its pipeline on several ranks: call it between two chunks")
        with self._lock:
            self._check_ahead(stream)
            self._thread = threading.get_ident()
            try:
                yield
            finally:
                self._thread = None

    def _check_ahead(self, stream: int | None) -> None:
        if self.ahead not in (None, stream):
            raise ConfigError("another stream is open and works ahead: finish it, or call its close(), first")

    @contextmanager
    def _failing(self, board: NoticeBoard, turn: Turn, call: str) -> Iterator[None]:
        self.open = turn
        try:
            yield
        except BaseException as error:
            if not isinstance(error, Exception):  # anywhere, even within a collective
                self._cut = (
                    f"rank {self.rank} {raised(error)} in a call of all ranks ({call}), from which none can "
                    "go on: end the program on every rank"
                )
            board.fail(Failure(turn.number, self._started(), raised(error)))
            raise
        finally:
            self.open = None

    def _meet(
        self, board: NoticeBoard, number: int, call: str, ranks: Sequence[int], stream: int | None, chunk: int
    ) -> None:
        """Waits for the other ranks and compares their calls."""
        keys = {rank: f"turn/{number}/{rank}" for rank in ranks}
        own, every = keys[self.rank], list(keys.values())
        board.put(own, call)
        pause = Pause()
        while not board.has(every):
            if pause.is_due():
                self._look(board, keys, call, stream, chunk)
            pause.sleep()
        calls = dict(zip(ranks, board.texts(every), strict=True))
        for key, readers in self._kept:
            if readers <= set(ranks):  # all of them have come to this turn, so they have read it
                board.remove(key)
        self._kept = [(key, readers) for key, readers in self._kept if not readers <= set(ranks)]
        self._kept.append((own, frozenset(ranks)))
        compare(calls)

    def _look(self, board: NoticeBoard, keys: dict[int, str], own_call: str, stream: int | None, chunk: int) -> None:
        """Raises an error if the ranks that have come make different calls, or one that has not come never will."""
        calls: dict[int, str] = {}
        for rank, key in keys.items():
            notice = board.read(rank)  # read before its call, since it may come in between
            if board.has([key]):
                calls[rank] = board.texts([key])[0]
                continue
            left = None if notice is None or stream is None else notice.left.get(stream)
            if notice is not None and notice.ended:
                raise RankLostError(f"rank {rank} {notice.ended}, and rank {self.rank} {own_call}")
            if left is not None and left[0] <= chunk:
                raise RankLostError(f"rank {rank} {left[1]}, and rank {self.rank} {own_call}")
        compare(calls)


class Pause:
    """The time between two looks at the store: a share of what was waited so far."""

    def __init__(self) -> None:
        self._started = self._looked = time.monotonic()

    def sleep(self) -> None:
        """Waits."""
        time.sleep(min(LONGEST_S, max(SHORTEST_S, SHARE * (time.monotonic() - self._started))))

    def is_due(self) -> bool:
        """Whether it is time to look at the notices of ranks that have not come."""
        if time.monotonic() - self._looked < LOOK_S:
            return False
        self._looked = time.monotonic()
        return True


def compare(calls: dict[int, str]) -> None:
    """Raises ConfigError unless all of these ranks make the same call."""
    if len(set(calls.values())) > 1:
        ways = "; ".join(f"rank {rank} {call}" for rank, call in calls.items())
        raise ConfigError(f"ranks part ways: {ways}: all must make the same calls in the same order")
