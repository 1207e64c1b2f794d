"""A watchdog that detects a lost rank, which has ended, is stopped or is stuck, and names it.

A collective that one rank does not join blocks all the others until its timeout, and cannot name the missing rank. So a
thread of every rank writes to the rendezvous store twice a second that the rank is alive, and how many collectives it
has reached.
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
import time
from collections.abc import Callable, Collection

from torch.distributed import Store  # type: ignore[attr-defined]

from causalrope_sp.siblings import Siblings

EVERY_S = 0.5  # seconds between two signs of life
LAST_S = 3.0  # how many seconds rank 0 waits for the others at the end
_DONE = "done"


def leave(message: str) -> None:
    """Prints an error and ends this process at once, since it may be inside a collective that never returns."""
    sys.stderr.write(f"error: {message}\n")
    sys.stderr.flush()
    os._exit(1)


class Watchdog:
    """Monitors the other ranks from a thread until `stop` is called.

    Args:
        store: the rendezvous store that all ranks share.
        rank: this rank.
        ranks: how many ranks there are.
        begun: returns how many collectives this rank has reached.
        peers: the ranks that make the same collectives as this one: those that denoise, or those that decode.
        on_loss: called once, from the thread, with a line that names the lost rank.
        silence_s: how many seconds a rank may give no sign of life before it counts as lost.
        stall_s: how many seconds a rank may have reached fewer collectives than this one, without progress, before it
            counts as stuck.
        siblings: the other ranks of this machine, whose end or stop is seen at once; None for none.
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        ranks: int,
        begun: Callable[[], int],
        peers: Collection[int],
        on_loss: Callable[[str], None],
        silence_s: float,
        stall_s: float,
        siblings: Siblings | None = None,
    ) -> None:
        self._store, self._rank, self._ranks = store, rank, ranks
        self._begun, self._peers, self._on_loss = begun, peers, on_loss
        self._silence_s, self._stall_s = silence_s, stall_s
        self._siblings = siblings
        self._stopping = threading.Event()
        self._beat = 0
        self._signal()
        self._thread = threading.Thread(target=self._monitor, name="watchdog", daemon=True)
        self._thread.start()
        atexit.register(self.stop)

    def stop(self) -> None:
        """Stops monitoring and tells the other ranks that this one is done.

        Rank 0, whose process may hold the store, waits up to `LAST_S` seconds until the others are done.
        """
        if self._stopping.is_set():
            return
        self._stopping.set()
        self._thread.join(2 * EVERY_S)
        self._store.set(self._key(self._rank), _DONE)
        others, deadline = list(range(1, self._ranks)), time.monotonic() + LAST_S
        while self._rank == 0 and others and time.monotonic() < deadline:
            others = [rank for rank in others if self._read(rank) != _DONE]
            time.sleep(0.01)

    def who_is_silent(self, within_s: float) -> str | None:
        """Finds the rank that gives no more signs of life, after a collective has failed.

        Args:
            within_s: how many seconds to look for it.

        Returns:
            A line that names the rank, or None if all ranks give signs of life.
        """
        before = {rank: self._read(rank) for rank in range(self._ranks) if rank != self._rank}
        deadline = time.monotonic() + within_s
        while time.monotonic() < deadline:
            time.sleep(4 * EVERY_S)
            for rank, sign in before.items():
                if sign != _DONE and self._read(rank) == sign:
                    return f"rank {rank} is gone: it has stopped giving signs of life"
        return None

    def _monitor(self) -> None:
        """Signals and checks the other ranks until `stop`, or until a rank is lost."""
        signs = [("", time.monotonic()) for _ in range(self._ranks)]
        counts = [(-1, time.monotonic()) for _ in range(self._ranks)]
        last = time.monotonic()
        while not self._stopping.wait(EVERY_S):
            now = time.monotonic()
            if now - last > self._silence_s / 2:  # this process was paused itself, and perhaps all of them
                signs, counts = [("", now)] * self._ranks, [(-1, now)] * self._ranks
            last = now
            lost = self._find_lost_sibling()
            try:
                if lost is None:
                    self._signal()
                    lost = self._find_lost_rank(signs, counts)
            except Exception as error:
                lost = f"the rendezvous store does not answer, so the machine that holds it is gone ({error})"
            if lost is not None and not self._stopping.is_set():
                self._on_loss(lost)
                return

    def _find_lost_sibling(self) -> str | None:
        """A line that names a rank of this machine that has ended without being done, or is stopped; None if all go on.

        A stopped rank is ended, since its launcher would wait for it.
        """
        while self._siblings is not None and (lost := self._siblings.lost()) is not None:
            rank, reason = lost
            try:
                done = self._read(rank) == _DONE
            except Exception:  # the store has gone with the rank
                done = False
            if not done:
                self._siblings.end(rank)
                return reason
            self._siblings.excuse(rank)
        return None

    def _find_lost_rank(self, signs: list[tuple[str, float]], counts: list[tuple[int, float]]) -> str | None:
        """A line that names a silent rank, or the furthest behind of the ranks that hold up this one, or None.

        The ranks that hold up this one may wait for the one that is furthest behind. `signs` and `counts` hold every
        rank's last sign of life and count of collectives, each with the time at which it changed.
        """
        now, own_count, stuck = time.monotonic(), self._begun(), dict[int, int]()
        for rank in range(self._ranks):
            sign = self._read(rank)
            if sign == _DONE and self._siblings is not None:
                self._siblings.excuse(rank)
            if rank == self._rank or sign == _DONE:
                continue
            if sign != signs[rank][0]:
                signs[rank] = (sign, now)
            count = int(sign.split()[1]) if sign else -1
            if count != counts[rank][0] or count >= own_count or rank not in self._peers:
                counts[rank] = (count, now)
            if now - signs[rank][1] > self._silence_s:
                return f"rank {rank} has not been heard of for {self._silence_s:g} s: it is gone, or stopped"
            if now - counts[rank][1] > self._stall_s:
                stuck[rank] = count
        if not stuck:
            return None
        rank = min(stuck, key=lambda r: stuck[r])
        return f"rank {rank} has held up rank {self._rank} for {self._stall_s:g} s: it is stuck"

    def _read(self, rank: int) -> str:
        """The last sign of life of a rank; empty if it has given none yet."""
        key = self._key(rank)
        return self._store.get(key).decode() if self._store.check([key]) else ""

    def _signal(self) -> None:
        """Writes a sign of life of this rank, with its count of collectives."""
        self._beat += 1
        self._store.set(self._key(self._rank), f"{self._beat} {self._begun()}")

    @staticmethod
    def _key(rank: int) -> str:
        """The key of a rank's signs of life in the store."""
        return f"causalrope/alive/{rank}"
