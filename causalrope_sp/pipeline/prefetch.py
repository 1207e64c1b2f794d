"""An iterator that works one item ahead, in a thread of its own."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator
from typing import TypeVar

import torch

T = TypeVar("T")
Ready = tuple[T, torch.cuda.Event | None]


def prefetch_one(items: Generator[T], device: torch.device) -> Generator[Ready[T]]:
    """The items, each with the event after which it is ready on CUDA. While the caller is busy with one, the next is
    being made.

    How far ahead it is does not depend on time: whoever has taken n items has had exactly n + 1 of them made, also when
    it stops early. So ranks that stop at the same item have all met in the same collectives.
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
    wanted.put(True)
    try:
        while (made := ready.get()) is not None:
            if isinstance(made, BaseException):
                raise made
            wanted.put(True)
            yield made
    finally:
        wanted.put(False)
        thread.join()


def _event(device: torch.device) -> torch.cuda.Event | None:
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()
    event.record()
    return event
