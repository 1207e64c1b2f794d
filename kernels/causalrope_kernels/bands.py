"""Bands of a frame: the queries of each see some of the tokens of every slot."""

from __future__ import annotations

from dataclasses import dataclass

Spans = tuple[tuple[int, int], ...]  # tokens of a frame, as [first, stop)


@dataclass(frozen=True, eq=False)  # launches are found by it, which a comparison of numbers would make slow
class Bands:
    """What the queries of a frame see of every slot.

    Args:
        queries: the queries of each band, as [first, stop) of those of a frame; together they are all of them, in
            order.
        keys: the tokens of a slot that they see, as [first, stop); none where both are equal.
        slot_tokens: the rows of the keys that make one slot.
    """

    queries: Spans
    keys: Spans
    slot_tokens: int

    @property
    def frame_queries(self) -> int:
        """The queries of a frame."""
        return self.queries[-1][1]

    def tiles(self, frames: int, size: int) -> tuple[tuple[int, int, int, int], ...]:
        """Returns what each program of a kernel attends.

        Args:
            frames: the frames of the queries.
            size: the most queries that a program holds.

        Returns:
            For every program its queries, as [first, stop), and the tokens of a slot that they see, as [first, stop).
        """
        return tuple(
            (frame * self.frame_queries + begin, frame * self.frame_queries + min(begin + size, stop), *seen)
            for frame in range(frames)
            for (first, stop), seen in zip(self.queries, self.keys, strict=True)
            for begin in range(first, stop, size)
        )
