"""The watchdog names the rank that is lost, stuck, or will never come."""

from __future__ import annotations

import queue
import time

import pytest
from torch.distributed import HashStore  # type: ignore[attr-defined]

from causalrope_sp.distributed.notices import DONE, Failure, Notice, NoticeBoard
from causalrope_sp.distributed.watchdog import Watchdog


class Neighbours:
    """Ranks that talk through a store, and what the watchdog of rank 0 says of them."""

    def __init__(self, begun: int, ranks: int = 2, peers: int = 4, in_turn: bool = False) -> None:
        store, self.said = HashStore(), queue.Queue[str]()
        self.boards = [NoticeBoard(store, rank, ranks) for rank in range(ranks)]
        self.dog = Watchdog(
            self.boards[0],
            0,
            lambda: begun,
            range(peers),
            self.said.put,
            silence_s=1.5,
            stall_s=3,
            holds_store=True,
            hopeless=lambda rank, notice: f"rank {rank} {notice.failure.why}" if in_turn and notice.failure else None,
        )

    def say(self, rank: int, begun: int) -> None:
        self.boards[rank].beat(begun)


@pytest.mark.parametrize("ever", [False, True], ids=["never heard of", "silent now"])
def test_a_silent_rank_is_named(ever: bool) -> None:
    ranks = Neighbours(begun=0)
    if ever:
        ranks.say(1, 0)
    assert ranks.said.get(timeout=10) == "rank 1 has not been heard of for 1.5 s: it is gone, or stopped"
    ranks.dog.stop()


def test_the_rank_that_is_furthest_behind_is_the_stuck_one() -> None:
    """Ranks 1 and 3 wait for rank 2 themselves."""
    ranks, started = Neighbours(begun=7, ranks=4), time.monotonic()
    while ranks.boards[1].read(0) == Notice(1, 7) or (ranks.said.empty() and time.monotonic() - started < 10):
        for rank, begun in ((1, 6), (2, 5), (3, 6)):
            ranks.say(rank, begun)
        time.sleep(0.1)
    while ranks.said.empty() and time.monotonic() - started < 20:  # rank 0 gives the others time to learn of its end
        time.sleep(0.1)
    assert ranks.said.get_nowait() == "rank 2 has held up rank 0 for 3 s: it is stuck"
    told = ranks.boards[1].read(0)
    assert told is not None
    assert told.ended == "stops: rank 2 has held up rank 0 for 3 s: it is stuck"
    ranks.dog.stop()


def test_a_rank_that_ended_by_an_error_is_named_where_this_one_waits_in_a_collective() -> None:
    """Nobody else is left, and rank 1 never joins the collective that rank 0 has begun."""
    ranks = Neighbours(begun=5)
    ranks.boards[1].end("raised ValueError: boom", 4)
    assert ranks.said.get(timeout=10) == "rank 1 raised ValueError: boom, and rank 0 waits for it"
    ranks.dog.stop()


def test_after_a_failure_the_rank_that_fell_silent_is_named() -> None:
    ranks = Neighbours(begun=0)
    ranks.say(1, 0)
    assert ranks.dog.cause() in (
        "rank 1 is gone: it has stopped giving signs of life",
        "rank 1 has not been heard of for 1.5 s: it is gone, or stopped",
    )
    ranks.dog.stop()


def test_after_a_failure_what_a_rank_said_at_its_end_is_the_cause() -> None:
    ranks = Neighbours(begun=0)
    ranks.boards[1].end("raised ValueError: boom", 3)
    started = time.monotonic()
    assert ranks.dog.cause() == "rank 1 raised ValueError: boom"
    assert time.monotonic() - started < 2
    ranks.dog.stop()


@pytest.mark.parametrize(
    ("begun", "peers", "named"),
    [(5, 2, True), (4, 2, False), (4, 1, True)],
    ids=["waits for it", "may raise the same", "only decodes"],
)
def test_a_rank_that_failed_is_named_where_it_keeps_others_waiting(begun: int, peers: int, named: bool) -> None:
    """It had started 4 collectives."""
    ranks, started = Neighbours(begun, peers=peers, in_turn=True), time.monotonic()
    ranks.boards[1].fail(Failure(1, 4, "raised ValueError: boom"))
    while time.monotonic() - started < 4:
        ranks.say(1, 4)
        time.sleep(0.1)
    ranks.boards[1].end(DONE, 4)
    if named:
        assert ranks.said.get(timeout=5) == "rank 1 raised ValueError: boom"
    ranks.dog.stop()
    assert ranks.said.empty()


@pytest.mark.parametrize(("begun", "peers"), [(7, 2), (8, 2), (3, 1)], ids=["waiting too", "ahead", "decodes"])
def test_a_rank_that_nobody_waits_for_is_left_alone(begun: int, peers: int) -> None:
    ranks, started = Neighbours(begun=7, peers=peers), time.monotonic()
    while time.monotonic() - started < 5:
        ranks.say(1, begun)
        time.sleep(0.1)
    ranks.dog.stop()
    assert ranks.said.empty()
    told = ranks.boards[1].read(0)
    assert told is not None
    assert told.ended == DONE
