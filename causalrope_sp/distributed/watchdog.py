"""Notices a rank that is gone, stopped or stuck, and says which.

A collective that misses one rank blocks all the others until its time is up, and then cannot tell whom it missed. So
every rank says twice a second, from a thread of its own and through the rendezvous store, that it is alive and how many
collectives it has begun.
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

EVERY_S = 0.5
LAST_S = 3.0  # how long rank 0 waits for the others at the end
_DONE = "done"


def leave(message: str) -> None:
    """Says it and ends this process at once: it may be inside a collective that never returns."""
    sys.stderr.write(f"error: {message}\n")
    sys.stderr.flush()
    os._exit(1)


class Watchdog:
    """Watches the other ranks from a thread until `stop`.

    Args:
        store: the rendezvous store that all ranks share.
        begun: how many collectives this rank has come to.
        peers: the ranks that come to as many: those that denoise, or those that decode.
        on_loss: called once, from the thread, with a line that names the rank.
        silence_s: how long a rank may say nothing (it is gone, or stopped) before it counts as lost.
        stall_s: how long a rank may hold up this one, which has come to more collectives, before it counts as stuck.
        siblings: the ranks of this machine, whose end or stop is seen at once.
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
        self._siblings, self._finished = siblings, set[int]()
        self._stopping = threading.Event()
        self._beat = 0
        self._say()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()
        atexit.register(self.stop)

    def stop(self) -> None:
        """This rank is done, and missed by nobody. Rank 0, which may hold the store, waits a little for the others."""
        if self._stopping.is_set():
            return
        self._stopping.set()
        self._thread.join(2 * EVERY_S)
        self._store.set(self._key(self._rank), _DONE)
        others, deadline = list(range(1, self._ranks)), time.monotonic() + LAST_S
        while self._rank == 0 and others and time.monotonic() < deadline:
            others = [rank for rank in others if self._hear(rank) != _DONE]
            time.sleep(0.01)

    def who_is_silent(self, within_s: float) -> str | None:
        """After a collective has failed: the rank that says nothing more, or None if all go on for `within_s`."""
        before = {rank: self._hear(rank) for rank in range(self._ranks) if rank != self._rank}
        deadline = time.monotonic() + within_s
        while time.monotonic() < deadline:
            time.sleep(4 * EVERY_S)
            for rank, said in before.items():
                if said != _DONE and self._hear(rank) == said:
                    return f"rank {rank} is gone: it has stopped giving signs of life"
        return None

    def _watch(self) -> None:
        heard = [("", time.monotonic()) for _ in range(self._ranks)]
        counts = [(-1, time.monotonic()) for _ in range(self._ranks)]
        last = time.monotonic()
        while not self._stopping.wait(EVERY_S):
            now = time.monotonic()
            if now - last > self._silence_s / 2:  # this process was paused itself, and perhaps all of them
                heard, counts = [("", now)] * self._ranks, [(-1, now)] * self._ranks
            last = now
            lost = self._lost_here()
            try:
                if lost is None:
                    self._say()
                    lost = self._listen(heard, counts)
            except Exception as error:
                lost = f"the rendezvous store does not answer, so the machine that holds it is gone ({error})"
            if lost is not None and not self._stopping.is_set():
                self._on_loss(lost)
                return

    def _lost_here(self) -> str | None:
        """A rank of this machine that has ended without being done, or is stopped. The latter is ended, since its
        launcher would wait for it."""
        lost = None if self._siblings is None else self._siblings.lost()
        if lost is None or self._siblings is None:
            return None
        rank, said = lost
        try:
            done = rank in self._finished or self._hear(rank) == _DONE
        except Exception:  # the store has gone with the rank
            done = False
        if done:
            return None
        self._siblings.end(rank)
        return said

    def _listen(self, heard: list[tuple[str, float]], counts: list[tuple[int, float]]) -> str | None:
        """A rank that is silent, or of those that hold up this one the one that is furthest behind: the others wait
        for it as well."""
        now, mine, stuck = time.monotonic(), self._begun(), dict[int, int]()
        for rank in range(self._ranks):
            said = self._hear(rank)
            if said == _DONE:
                self._finished.add(rank)
            if rank == self._rank or said == _DONE:
                continue
            if said != heard[rank][0]:
                heard[rank] = (said, now)
            count = int(said.split()[1]) if said else -1
            if count != counts[rank][0] or count >= mine or rank not in self._peers:
                counts[rank] = (count, now)
            if now - heard[rank][1] > self._silence_s:
                return f"rank {rank} has not been heard of for {self._silence_s:g} s: it is gone, or stopped"
            if now - counts[rank][1] > self._stall_s:
                stuck[rank] = count
        if not stuck:
            return None
        rank = min(stuck, key=lambda r: stuck[r])
        return f"rank {rank} has held up rank {self._rank} for {self._stall_s:g} s: it is stuck"

    def _hear(self, rank: int) -> str:
        """What a rank said last; nothing if it has said nothing yet."""
        key = self._key(rank)
        return self._store.get(key).decode() if self._store.check([key]) else ""

    def _say(self) -> None:
        self._beat += 1
        self._store.set(self._key(self._rank), f"{self._beat} {self._begun()}")

    @staticmethod
    def _key(rank: int) -> str:
        return f"causalrope/alive/{rank}"
