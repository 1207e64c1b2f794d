"""The open streams of a pipeline, and what they hold together."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Protocol
from weakref import WeakSet

from torch import Tensor

from causalrope_sp.devices import storage_bytes
from causalrope_sp.sampling.settled import SettledWeights


class Stream(Protocol):
    """What is asked of an open stream."""

    @property
    def is_open(self) -> bool:
        """Whether more chunks can be made."""
        ...

    @property
    def planned_bytes(self) -> int:
        """What it keeps between two chunks once its window is full, in bytes."""
        ...

    @property
    def settled(self) -> tuple[SettledWeights, ...] | None:
        """How it computes the model; None before it begins."""
        ...

    def tensors(self) -> Iterator[Tensor]:
        """Yields what it keeps between two chunks."""
        ...


class OpenStreams:
    """The open streams of a pipeline, as long as they are referred to and neither complete nor closed.

    Attributes:
        changing: held while a thread changes the weights of the pipeline.
        beginning: in one process, held while a stream begins or weights change. On several ranks turns do that.
    """

    def __init__(self) -> None:
        self._streams: WeakSet[Stream] = WeakSet()
        self.changing, self.beginning = threading.Lock(), threading.RLock()

    def add(self, stream: Stream) -> None:
        """Adds a stream."""
        self._streams.add(stream)

    def __iter__(self) -> Iterator[Stream]:
        return iter(list(self._streams))

    def __len__(self) -> int:
        return sum(stream.is_open for stream in self._streams)

    @property
    def planned_bytes(self) -> int:
        """What these streams keep between two chunks once their windows are full, in bytes."""
        return sum(stream.planned_bytes for stream in self._streams if stream.is_open)

    @property
    def held_bytes(self) -> int:
        """What they hold now, in bytes; what forks share counts once."""
        return storage_bytes(tensor for stream in self._streams for tensor in stream.tensors())

    @property
    def settled(self) -> tuple[SettledWeights, ...] | None:
        """How one of these streams computes the model, to be shared by another one; None if none has begun."""
        return next((found for stream in self._streams if (found := stream.settled) is not None), None)
