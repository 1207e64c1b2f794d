"""Ranks that read a checkpoint together, as loading sees them: each parameter is read by one and sent to the others."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, TypeVar

from torch import Tensor

T = TypeVar("T")


class Readers(Protocol):
    """`parallel.ranks.Ranks` is one."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def run_collectively(self, work: Callable[[], T]) -> T:
        """What `work` returns on this rank. Wrong input that it meets on any rank is raised on every one."""
        ...

    def agree(self, on: Mapping[str, object]) -> None:
        """Raises ConfigError on every rank if a field is not the same on all of them."""
        ...

    def broadcast(self, kind: str, room: Tensor, source: int) -> Tensor:
        """Fills `room` on every rank with what it holds on the rank `source`."""
        ...


class Alone:
    """One process, which reads everything and has nobody to tell."""

    rank, size = 0, 1

    def run_collectively(self, work: Callable[[], T]) -> T:
        return work()

    def agree(self, on: Mapping[str, object]) -> None:
        pass

    def broadcast(self, kind: str, room: Tensor, source: int) -> Tensor:
        return room


def owners(sizes: Sequence[int], ranks: int) -> list[int]:
    """Which rank reads each of some parameters, in order: whoever has the fewest bytes to read so far."""
    reads = [0] * ranks
    chosen = []
    for size in sizes:
        rank = reads.index(min(reads))
        reads[rank] += size
        chosen.append(rank)
    return chosen
