"""The ranks that load a checkpoint, as the loader sees them: one reads each parameter and broadcasts it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, TypeVar

from torch import Tensor

T = TypeVar("T")


class Readers(Protocol):
    """A group of ranks that load the same model. `distributed.ranks.Ranks` is one."""

    @property
    def rank(self) -> int:
        """This rank's number within the group."""
        ...

    @property
    def size(self) -> int:
        """How many ranks there are."""
        ...

    def run_collectively(self, work: Callable[[], T]) -> T:
        """Runs `work` on every rank; an error of wrong input on any rank is raised on all.

        Returns:
            What `work` returned on this rank.

        Raises:
            CausalRopeError: what `work` raised on this or on another rank.
        """
        ...

    def agree(self, on: Mapping[str, object]) -> None:
        """Checks that the ranks agree on every field.

        Raises:
            ConfigError: on every rank, if a field differs between ranks.
        """
        ...

    def broadcast(self, kind: str, buffer: Tensor, source: int, /) -> Tensor:
        """Fills a buffer on every rank with what it holds on the rank `source`.

        Args:
            kind: the name that the transfer is counted under.
            buffer: of the same shape and dtype on every rank.
            source: the rank whose content is sent.

        Returns:
            `buffer`.
        """
        ...


class Alone:
    """A `Readers` of one process, which reads all parameters itself."""

    rank, size = 0, 1

    def run_collectively(self, work: Callable[[], T]) -> T:
        """Returns what `work` returns."""
        return work()

    def agree(self, on: Mapping[str, object]) -> None:
        """Does nothing: one process agrees with itself."""

    def broadcast(self, kind: str, buffer: Tensor, source: int, /) -> Tensor:
        """Returns the buffer as it is."""
        return buffer


def owners(sizes: Sequence[int], ranks: int) -> list[int]:
    """Assigns each parameter to a rank that reads it: the one with the fewest bytes so far, the lowest of equals.

    Args:
        sizes: bytes of each parameter.
        ranks: how many ranks there are.

    Returns:
        The rank of each parameter, in order.
    """
    reads = [0] * ranks
    chosen = []
    for size in sizes:
        rank = reads.index(min(reads))
        reads[rank] += size
        chosen.append(rank)
    return chosen
