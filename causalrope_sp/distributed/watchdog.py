"""A watchdog that detects a lost rank, which has ended, is stopped, is stuck or has parted from the others.

A collective that one rank does not join blocks all the others until its timeout, and cannot name the missing rank. So a
thread of every rank tells the others twice a second through the rendezvous store that it is alive, and how many
collectives it has reached, and names a rank that is lost.
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
import time
from collections.abc import Callable, Collection
from contextlib import suppress

from causalrope_sp.distributed.notices import DONE, EXITED, Notice, NoticeBoard
from causalrope_sp.errors import RankLostError
from causalrope_sp.siblings import Siblings

EVERY_S = 0.5  # seconds between two signs of life
LAST_S = 4.0  # how many seconds the rank that holds the store waits for the others at the end
HOPELESS_S = 2.0  # how long a rank gets no further because of one that has failed before it counts as lost
CAUSE_S = 6.0  # how many seconds to look for the cause of a collective that failed
QUIET_S = 3.0  # how long no sign of life, after a collective has failed, means that a rank is gone


def leave(message: str) -> None:
    """Prints an error and ends this process at once, since it may be inside a collective that never returns."""
    sys.stderr.write(f"error: {message}\n")
    sys.stderr.flush()
    os._exit(1)


class Watchdog:
    """Monitors the other ranks from a thread until `stop` is called.

    Args:
        board: the notices of all ranks.
        rank: this rank.
        begun: returns how many collectives this rank has reached.
        peers: the ranks that make the same collectives as this one: those that denoise, or those that decode.
        on_loss: called once, from the thread, with a line that names the lost rank.
        silence_s: how many seconds a rank may give no sign of life before it counts as lost.
        stall_s: how many seconds a rank may have reached fewer collectives than this one, without progress, before it
            counts as stuck.
        hopeless: returns why a rank with such a notice keeps this one from ever ending its turn, or None.
        siblings: the other ranks of this machine, whose end or stop is seen at once; None for none.
        holds_store: whether this process holds the store, so that it waits for the other ranks before it ends.
    """

    def __init__(
        self,
        board: NoticeBoard,
        rank: int,
        begun: Callable[[], int],
        peers: Collection[int],
        on_loss: Callable[[str], None],
        silence_s: float,
        stall_s: float,
        hopeless: Callable[[int, Notice], str | None] = lambda rank, notice: None,
        siblings: Siblings | None = None,
        holds_store: bool = False,
    ) -> None:
        self._board, self._rank = board, rank
        self._begun, self._peers, self._on_loss, self._hopeless = begun, peers, on_loss, hopeless
        self._silence_s, self._stall_s = silence_s, stall_s
        self._siblings, self._holds_store = siblings, holds_store
        self._stopping = threading.Event()
        now = time.monotonic()
        self._beats = dict.fromkeys(board.others, (-1, now))  # the last of each rank, and when it changed
        self._counts = dict.fromkeys(board.others, (-1, now))
        self._own = (0, now)
        board.beat(begun())
        self._thread = threading.Thread(target=self._monitor, name="watchdog", daemon=True)
        self._thread.start()
        atexit.register(self.stop, EXITED)

    def stop(self, why: str = DONE) -> None:
        """Stops monitoring and tells the other ranks that this one makes no more calls.

        A rank that holds the store waits up to `LAST_S` seconds until the others have ended too.

        Args:
            why: how this rank ends, in words that follow its name.
        """
        if self._stopping.is_set():
            return
        self._stopping.set()
        self._thread.join(2 * EVERY_S)
        atexit.unregister(self.stop)
        self._end(why)

    def cause(self) -> str | None:
        """Looks for `CAUSE_S` seconds for the rank because of which a collective has failed.

        Returns:
            A line that names the rank, or None if all ranks go on.
        """
        deadline, quiet = time.monotonic() + CAUSE_S, dict[int, tuple[int, float]]()
        while time.monotonic() < deadline:
            try:
                told = self._told_end() or self._find_quiet(quiet)
                lost = None if self._siblings is None else self._siblings.lost()
            except RankLostError as error:
                return str(error)
            if told is not None or lost is not None:
                return told or (lost[1] if lost is not None else None)
            time.sleep(EVERY_S / 2)
        return None

    def _end(self, why: str) -> None:
        """Tells the other ranks how this one ends, and waits for them if it holds the store."""
        self._board.end(why, self._begun())
        deadline = time.monotonic() + LAST_S
        with suppress(RankLostError):  # the store has gone
            while self._holds_store and not self._board.alone and time.monotonic() < deadline:
                for rank in self._board.others:
                    self._board.read(rank)
                time.sleep(0.01)

    def _told_end(self) -> str | None:
        """A line that names a rank that has told why it goes no further, an error first; None if none has."""
        ended: list[str] = []
        for rank in self._board.others:
            notice = self._board.read(rank)
            if notice is not None and (why := self._hopeless(rank, notice)) is not None:
                return why
            if notice is not None and notice.ended:
                ended.append(f"rank {rank} {notice.ended}")
        return min(ended, key=lambda line: line.endswith((DONE, EXITED)), default=None)

    def _find_quiet(self, quiet: dict[int, tuple[int, float]]) -> str | None:
        """A line that names a rank without a sign of life for `QUIET_S`. `quiet` holds the last of every rank."""
        now = time.monotonic()
        for rank in self._board.others:
            notice = self._board.read(rank) or Notice()
            if notice.beat != quiet.setdefault(rank, (notice.beat, now))[0]:
                quiet[rank] = (notice.beat, now)
            elif now - quiet[rank][1] > QUIET_S and not notice.ended:
                return f"rank {rank} is gone: it has stopped giving signs of life"
        return None

    def _monitor(self) -> None:
        """Signals and checks the other ranks until `stop`, or until a rank is lost."""
        last = time.monotonic()
        while not self._stopping.wait(EVERY_S):
            now = time.monotonic()
            if now - last > self._silence_s / 2:  # this process was paused itself, and perhaps all of them
                self._beats = dict.fromkeys(self._beats, (-1, now))
                self._counts, self._own = dict(self._beats), (self._own[0], now)
            last = now
            try:
                lost = self._find_lost_sibling()
                if lost is None:
                    self._board.beat(self._begun())
                    lost = self._find_lost_rank()
            except RankLostError as error:
                if any(notice.ended for notice in self._board.last.values()):
                    return  # the store has gone with a rank that has ended: who waits for that one is told so
                lost = str(error)
            if lost is not None and not self._stopping.is_set():
                self._end(f"stops: {lost}")  # it may end its process, and with it the store
                self._on_loss(lost)
                return

    def _find_lost_sibling(self) -> str | None:
        """A line that names a rank of this machine that has ended and not told so, or is stopped; None if all go on.

        A stopped rank is ended, since its launcher would wait for it.
        """
        while self._siblings is not None and (lost := self._siblings.lost()) is not None:
            rank, reason = lost
            try:
                notice = self._board.read(rank)
            except RankLostError:  # the store has gone with the rank
                notice = self._board.last.get(rank)
            if notice is None or not notice.ended:
                self._siblings.end(rank)
                return reason
            self._siblings.excuse(rank, _error_of(notice))
        return None

    def _find_lost_rank(self) -> str | None:
        """A line that names a silent rank, one that has parted from the others, or the furthest behind of the ranks
        that hold up this one, or None. The ranks that hold up this one may wait for the one that is furthest behind."""
        now, own, stuck = time.monotonic(), self._begun(), dict[int, int]()
        if own != self._own[0]:
            self._own = (own, now)
        for rank in self._board.others:
            notice = self._board.read(rank) or Notice(begun=-1)
            if (why := self._never_comes(rank, notice, own)) is not None:
                return why
            if notice.ended:
                if self._siblings is not None:
                    self._siblings.excuse(rank, _error_of(notice))
                continue
            if notice.beat != self._beats[rank][0]:
                self._beats[rank] = (notice.beat, now)
            if notice.begun != self._counts[rank][0] or notice.begun >= own or rank not in self._peers:
                self._counts[rank] = (notice.begun, now)
            if now - self._beats[rank][1] > self._silence_s:
                return f"rank {rank} has not been heard of for {self._silence_s:g} s: it is gone, or stopped"
            if now - self._counts[rank][1] > self._stall_s:
                stuck[rank] = notice.begun
        if not stuck:
            return None
        rank = min(stuck, key=lambda r: stuck[r])
        return f"rank {rank} has held up rank {self._rank} for {self._stall_s:g} s: it is stuck"

    def _never_comes(self, rank: int, notice: Notice, own: int) -> str | None:
        """A line that names a rank that has failed or ended while this one waits for it; None if it may still come.

        A rank that has started as many collectives as this one may have raised what this one is about to raise.
        """
        why = self._hopeless(rank, notice)
        if why is None and notice.ended and rank in self._peers:
            why = f"rank {rank} {notice.ended}, and rank {self._rank} waits for it"
        if why is None:
            return None
        reached = notice.begun if notice.failure is None else max(notice.begun, notice.failure.begun)
        if (rank in self._peers and own <= reached) or time.monotonic() - self._own[1] < HOPELESS_S:
            return None
        return why


def _error_of(notice: Notice) -> str:
    """The error that ended a rank; empty if it has ended without one."""
    return "" if notice.ended in (DONE, EXITED) else notice.ended
