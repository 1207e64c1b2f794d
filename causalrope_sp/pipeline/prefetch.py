"""Sources of items that are made one after the other: when they are asked for, or one ahead in a background thread."""

from __future__ import annotations

import atexit
import queue
import threading
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

import torch

from causalrope_sp.devices import recorded_event

T = TypeVar("T")
Ready = tuple[T, torch.cuda.Event | None]


class OnDemand(Generic[T]):
    """Items that are made when they are asked for.

    Args:
        make: makes the next item of what `take` is given; returns None when there are no more.
    """

    def __init__(self, make: Callable[..., T | None]) -> None:
        self._make = make
        self._held: deque[Ready[T]] = deque()

    def take(self, *given: object) -> Ready[T] | None:
        """Returns the next item.

        Args:
            given: what `make` is given, unless the item is made already.

        Returns:
            The item with the CUDA event after which it is ready, or None if it is; None if there are no more items.

        Raises:
            BaseException: whatever `make` raises. The next call makes the item again.
        """
        if self._held:
            return self._held.popleft()
        item = self._make(*given)
        return None if item is None else (item, None)

    def put_back(self, item: Ready[T]) -> None:
        """Makes an item that was taken the next one again."""
        self._held.appendleft(item)

    def settle(self) -> list[T]:
        """Waits until nothing is being made.

        Returns:
            The items that were made and not taken, in order.
        """
        return [item for item, _ in self._held]

    def drop(self) -> None:
        """Forgets the items that were made and not taken."""
        self.settle()
        self._held.clear()

    def is_made_here(self) -> bool:
        """Whether the calling thread is the one that makes items ahead."""
        return False

    def close(self, wait: bool = True) -> None:
        """Ends the work, after the item that is being made.

        Args:
            wait: whether to wait until then.
        """


class Prefetch(OnDemand[T]):
    """Items that a thread makes, one ahead of the caller.

    The distance does not depend on time: when the caller has taken n items, exactly n + 1 have been made or are being
    made. Ranks that stop at the same item have therefore run the same collectives.

    Args:
        make: makes the next item, in the thread; returns None when there are no more.
        device: where the items are computed.
        stops: holds, as long as the thread is there, a function that ends it after the item that it makes.
    """

    def __init__(self, make: Callable[[], T | None], device: torch.device, stops: set[Callable[[], None]]) -> None:
        super().__init__(make)
        self._wanted: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._ready: queue.SimpleQueue[Ready[T] | BaseException | None] = queue.SimpleQueue()
        self._ordered = False
        arguments = make, device, self._wanted, self._ready
        self._thread = threading.Thread(target=_work, args=arguments, name="denoise", daemon=True)
        self._thread.start()
        self._stops, self._stop = stops, _stopper(self._thread, self._wanted)
        stops.add(self._stop)
        atexit.register(self._stop)  # a thread that computes while Python ends would abort the process

    def take(self, *given: object) -> Ready[T] | None:
        """Returns the next item and orders the one after it; see `OnDemand.take`."""
        assert not given, "items that are made ahead are made of nothing"
        if not self._held:
            if not self._ordered:
                self._order()
            self.settle()
        if not self._held:
            return None
        item = self._held.popleft()
        if not self._held and not self._ordered:
            self._order()
        return item

    def settle(self) -> list[T]:
        """Waits until the thread rests; see `OnDemand.settle`.

        Raises:
            BaseException: whatever `make` raised. The item will be made again.
        """
        if self._ordered:
            result = self._ready.get()
            self._ordered = False
            if isinstance(result, BaseException):
                raise result
            if result is not None:
                self._held.append(result)
        return super().settle()

    def is_made_here(self) -> bool:
        """Whether the calling thread is the one that makes items ahead."""
        return threading.current_thread() is self._thread

    def close(self, wait: bool = True) -> None:
        """Ends the thread after the item that it makes; see `OnDemand.close`."""
        self._stops.discard(self._stop)
        atexit.unregister(self._stop)
        if wait:
            self._stop()
        else:
            self._wanted.put(False)

    def _order(self) -> None:
        self._wanted.put(True)
        self._ordered = True


def _work(
    make: Callable[[], T | None],
    device: torch.device,
    wanted: queue.SimpleQueue[bool],
    ready: queue.SimpleQueue[Ready[T] | BaseException | None],
) -> None:
    while wanted.get():
        try:  # also what fails before an item reaches the caller, who waits for it
            if device.type == "cuda":
                torch.cuda.set_device(device)
            item = make()
            event = recorded_event(device) if item is not None and device.type == "cuda" else None
            ready.put(None if item is None else (item, event))
        except BaseException as error:
            ready.put(error)


def _stopper(thread: threading.Thread, wanted: queue.SimpleQueue[bool]) -> Callable[[], None]:
    def stop() -> None:
        wanted.put(False)
        if thread is not threading.current_thread():  # where the garbage is collected
            thread.join()

    return stop
