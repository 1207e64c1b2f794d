"""Work in the background keeps its order and ends with the run."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from causalrope_sp.cli.runtime import AHEAD, Background


def test_background_work_keeps_order_and_passes_errors_on() -> None:
    def numbers() -> Iterator[int]:
        yield from range(9)
        raise KeyError("end")

    seen: list[int] = []
    with pytest.raises(KeyError, match="end"):
        seen.extend(Background(numbers))
    items = iter(Background(numbers))
    assert [next(items) for _ in range(9)] == list(range(9))


def test_background_work_stops_when_nobody_listens() -> None:
    made = []

    def endless() -> Iterator[int]:
        while True:
            made.append(threading.current_thread())
            yield len(made)

    items = iter(Background(endless))
    assert next(items) == 1
    items.close()  # type: ignore[attr-defined]
    made[0].join(timeout=10)
    assert not made[0].is_alive()
    assert len(made) <= AHEAD + 2


def test_what_fails_elsewhere_ends_background_work() -> None:
    def stuck() -> Iterator[int]:
        yield 1
        threading.Event().wait()

    work = Background(stuck)
    items = iter(work)
    assert next(items) == 1
    threading.Timer(0.1, work.fail, [KeyError("lost")]).start()
    with pytest.raises(KeyError, match="lost"):
        next(items)
