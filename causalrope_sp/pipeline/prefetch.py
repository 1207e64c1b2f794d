"""`prefetch_one`: an iterator whose next item is computed in a background thread."""

from __future__ import annotations

import atexit
import queue
import threading
from collections.abc import Callable, Generator
from typing import TypeVar

import torch

T = TypeVar("T")
Ready = tuple[T, torch.cuda.Event | None]


def prefetch_one(items: Generator[T], device: torch.device, stops: set[Callable[[], None]]) -> Generator[Ready[T]]:
    """Computes the next item in a background thread while the caller works on the current one.

    The distance does not depend on time: when the caller has taken n items, exactly n + 1 have been computed or are
    being computed, also if the caller stops early. Ranks that stop at the same item have therefore run the same
    collectives.

    Args:
        items: the generator; it runs and is closed in the background thread.
        device: where the items are computed.
        stops: holds, as long as the thread is there, a function that ends it after the item that it computes.

    Yields:
        Each item with the CUDA event after which it is ready; the event is None on the CPU.

    Raises:
        BaseException: whatever `items` raises.
    """
    wanted: queue.SimpleQueue[bool] = queue.SimpleQueue()
    ready: queue.SimpleQueue[Ready[T] | BaseException | None] = queue.SimpleQueue()

    def work() -> None:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        try:
            while wanted.get():
                item = next(items, None)
                if item is None:
                    break
                ready.put((item, _event(device)))
            items.close()
            ready.put(None)
        except BaseException as error:
            ready.put(error)

    thread = threading.Thread(target=work, name="denoise", daemon=True)
    thread.start()

    def stop() -> None:
        wanted.put(False)
        if thread is not threading.current_thread():  # where the garbage is collected
            thread.join()

    stops.add(stop)
    atexit.register(stop)  # a thread that computes while Python ends would abort the process
    wanted.put(True)
    try:
        while (result := ready.get()) is not None:
            if isinstance(result, BaseException):
                raise result
            wanted.put(True)
            yield result
    finally:
        stops.discard(stop)
        atexit.unregister(stop)
        stop()


def _event(device: torch.device) -> torch.cuda.Event | None:
    """An event recorded in the thread's current CUDA stream; None on the CPU."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()
    event.record()
    return event
