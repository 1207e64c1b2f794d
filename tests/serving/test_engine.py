"""The engine's thread: rotation, calls between chunks, and its ends."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any, cast

import pytest

from causalrope_sp.errors import RankLostError
from causalrope_sp.serving.engine import Engine


class Stops:
    """In place of a pipeline's calls: notes that it was stopped."""

    stopped = False

    def stop(self) -> None:
        self.stopped = True


class Counting:
    """A source that needs so many chunks, and notes in `order` whenever it makes one."""

    def __init__(self, name: str, needs: int, order: list[str], error: BaseException | None = None) -> None:
        self.name, self.needs, self.order, self.error = name, needs, order, error
        self.ended, self.looks, self.kept = "", 0, False

    def needs_chunk(self) -> bool:
        return self.needs > 0

    def make_chunk(self) -> None:
        assert threading.current_thread().name == "engine"
        self.needs -= 1
        self.order.append(self.name)
        if self.error is not None:
            raise self.error

    def look(self) -> None:
        self.looks += 1

    def keep(self) -> None:
        self.kept = not self.ended

    def end(self, reason: str) -> None:
        self.ended = reason


@pytest.fixture
def failures() -> list[BaseException]:
    return []


@pytest.fixture
def engine(failures: list[BaseException]) -> Iterator[Engine]:
    engine = Engine(cast(Any, Stops()), failures.append)
    yield engine
    engine.stop()


def until(done: Any, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_sources_take_turns_and_those_without_need_are_passed_over(engine: Engine) -> None:
    order: list[str] = []
    sources = [Counting("a", 3, order), Counting("b", 1, order), Counting("c", 0, order), Counting("d", 3, order)]
    for source in sources:
        engine.add(source)
    engine.start()
    until(lambda: len(order) == 7)
    assert "".join(order) == "abdadad"


def test_a_call_runs_in_the_thread_between_two_chunks(engine: Engine) -> None:
    order: list[str] = []
    source = Counting("a", 10**9, order)
    engine.start()
    engine.submit(lambda: engine.add(source)).result(10)
    until(lambda: len(order) > 3)
    assert engine.submit(lambda: threading.current_thread().name).result(10) == "engine"
    engine.submit(lambda: engine.remove(source)).result(10)
    count = len(order)
    time.sleep(0.05)
    assert len(order) == count


def test_an_error_of_a_call_reaches_its_caller_alone(engine: Engine) -> None:
    def fail() -> None:
        raise ValueError("no")

    engine.start()
    with pytest.raises(ValueError, match="no"):
        engine.submit(fail).result(10)
    assert engine.submit(lambda: 7).result(10) == 7


def test_sources_are_looked_at_while_nothing_happens(engine: Engine) -> None:
    source = Counting("a", 0, [])
    engine.add(source)
    engine.start()
    until(lambda: source.looks > 2)


def test_a_lost_rank_ends_all_sources_and_the_engine(engine: Engine, failures: list[BaseException]) -> None:
    lost = RankLostError("rank 1 has ended")
    other, failing = Counting("b", 0, []), Counting("a", 1, [], lost)
    engine.add(other)
    engine.add(failing)
    engine.start()
    until(lambda: bool(failures))
    assert failures == [lost]
    assert other.ended == failing.ended == "a rank of the server is lost"
    assert not cast(Any, engine.commands).stopped
    assert not other.kept, "its ranks cannot be asked for anything"
    with pytest.raises(RankLostError, match="the server is stopping"):
        engine.submit(lambda: 7).result(10)


def test_a_stopped_engine_ends_its_sources_and_stops_the_ranks(engine: Engine, failures: list[BaseException]) -> None:
    source = Counting("a", 0, [])
    engine.add(source)
    engine.start()
    engine.stop()
    assert (source.kept, source.ended) == (True, "the server is stopping")
    assert cast(Any, engine.commands).stopped
    assert failures == []
