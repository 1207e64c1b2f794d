"""Notices a rank that is gone, stopped or stuck, and says which.

A collective that misses one rank blocks all the others until its time is up, and then cannot tell whom it missed. So
every rank says twice a second, from a thread of its own and through the rendezvous store, that it is alive and how many
collectives it has begun.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable

from torch._C._distributed_c10d import Store

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
        begun: how many collectives this rank has begun.
        on_loss: called once, from the thread, with a line that names the rank.
        silence_s: how long a rank may say nothing (it is gone, or stopped) before it counts as lost.
        stall_s: how long a rank may hold up others, who have begun more collectives, before it counts as stuck.
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        ranks: int,
        begun: Callable[[], int],
        on_loss: Callable[[str], None],
        silence_s: float,
        stall_s: float,
    ) -> None:
        self._store, self._rank, self._ranks = store, rank, ranks
        self._begun, self._on_loss = begun, on_loss
        self._silence_s, self._stall_s = silence_s, stall_s
        self._stopping = threading.Event()
        self._beat = 0
        self._say()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """This rank is done, and missed by nobody. Rank 0, which may hold the store, waits a little for the others."""
        self._stopping.set()
        self._thread.join(2 * EVERY_S)
        self._store.set(self._key(self._rank), _DONE)
        others = [self._key(rank) for rank in range(1, self._ranks)]
        deadline = time.monotonic() + LAST_S
        while self._rank == 0 and others and time.monotonic() < deadline:
            others = [key for key in others if self._store.get(key).decode() != _DONE]
            time.sleep(0.01)

    def _watch(self) -> None:
        heard = dict.fromkeys(range(self._ranks), ("", time.monotonic()))
        counts = dict.fromkeys(range(self._ranks), (-1, time.monotonic()))
        while not self._stopping.wait(EVERY_S):
            try:
                self._say()
                lost = self._listen(heard, counts)
            except Exception as error:
                lost = f"the rendezvous store does not answer, so rank 0 or its machine is gone ({error})"
            if lost is not None and not self._stopping.is_set():
                self._on_loss(lost)
                return

    def _listen(self, heard: dict[int, tuple[str, float]], counts: dict[int, tuple[int, float]]) -> str | None:
        now, mine = time.monotonic(), self._begun()
        for rank in range(self._ranks):
            said = self._store.get(self._key(rank)).decode()
            if rank == self._rank or said == _DONE:
                continue
            if said != heard[rank][0]:
                heard[rank] = (said, now)
            count = int(said.split()[1])
            if count != counts[rank][0] or count >= mine:
                counts[rank] = (count, now)
            if now - heard[rank][1] > self._silence_s:
                return f"rank {rank} has not been heard of for {self._silence_s:g} s: it is gone, or stopped"
            if now - counts[rank][1] > self._stall_s:
                return f"rank {rank} has held up rank {self._rank} for {self._stall_s:g} s: it is stuck"
        return None

    def _say(self) -> None:
        self._beat += 1
        self._store.set(self._key(self._rank), f"{self._beat} {self._begun()}")

    @staticmethod
    def _key(rank: int) -> str:
        return f"causalrope/alive/{rank}"
