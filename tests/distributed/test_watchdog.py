"""The watchdog names the rank that is lost or stuck."""

from __future__ import annotations

import queue
import time

import pytest
from torch.distributed import HashStore  # type: ignore[attr-defined]

from causalrope_sp.distributed.watchdog import Watchdog


class Neighbours:
    """Ranks that talk through a store, and what the watchdog of rank 0 says of them."""

    def __init__(self, begun: int, ranks: int = 2, peers: int = 4) -> None:
        self.store, self.said = HashStore(), queue.Queue[str]()
        self.dog = Watchdog(self.store, 0, ranks, lambda: begun, range(peers), self.said.put, silence_s=1.5, stall_s=3)

    def say(self, rank: int, beat: int, begun: int) -> None:
        self.store.set(f"causalrope/alive/{rank}", f"{beat} {begun}")


@pytest.mark.parametrize("ever", [False, True], ids=["never heard of", "silent now"])
def test_a_silent_rank_is_named(ever: bool) -> None:
    ranks = Neighbours(begun=0)
    if ever:
        ranks.say(1, 1, 0)
    assert ranks.said.get(timeout=10) == "rank 1 has not been heard of for 1.5 s: it is gone, or stopped"
    ranks.dog.stop()


def test_the_rank_that_is_furthest_behind_is_the_stuck_one() -> None:
    """Ranks 1 and 3 wait for rank 2 themselves."""
    ranks, started, beat = Neighbours(begun=7, ranks=4), time.monotonic(), 0
    while ranks.said.empty() and time.monotonic() - started < 10:
        beat += 1
        for rank, begun in ((1, 6), (2, 5), (3, 6)):
            ranks.say(rank, beat, begun)
        time.sleep(0.1)
    assert ranks.said.get_nowait() == "rank 2 has held up rank 0 for 3 s: it is stuck"
    ranks.dog.stop()


def test_after_a_failure_the_rank_that_fell_silent_is_named() -> None:
    ranks = Neighbours(begun=0)
    ranks.say(1, 1, 0)
    assert ranks.dog.who_is_silent(3) == "rank 1 is gone: it has stopped giving signs of life"
    ranks.dog.stop()


@pytest.mark.parametrize(("begun", "peers"), [(7, 2), (8, 2), (3, 1)], ids=["waiting too", "ahead", "decodes"])
def test_a_rank_that_nobody_waits_for_is_left_alone(begun: int, peers: int) -> None:
    ranks, started, beat = Neighbours(begun=7, peers=peers), time.monotonic(), 0
    while time.monotonic() - started < 5:
        beat += 1
        ranks.say(1, beat, begun)
        time.sleep(0.1)
    ranks.dog.stop()
    assert ranks.said.empty()
    assert ranks.store.get("causalrope/alive/0") == b"done"
