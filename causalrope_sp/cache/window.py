"""Computes which cache slots a chunk writes and reads: pure integer arithmetic without storage or state.

A frame's slot is a function of its global time index alone. The first `sink` frames keep their slots for ever; the
others share the ring of the remaining slots, where the newest frame overwrites the oldest. Slots fill in order, so the
slots that attention reads are always the first ones.
"""

from __future__ import annotations

from dataclasses import dataclass

from causalrope_sp.errors import ConfigError
from causalrope_sp.grid import Chunk


@dataclass(frozen=True)
class SlidingWindow:
    """The latent frames that attention looks back over.

    Args:
        frames: the size of the window in latent frames, current chunk included.
        sink: how many of the stream's first latent frames stay in the window for ever.

    Raises:
        ConfigError: `frames` is below 1, `sink` is negative, or `sink` is not below `frames`.
    """

    frames: int
    sink: int = 0

    def __post_init__(self) -> None:
        if self.frames < 1 or self.sink < 0 or self.sink >= self.frames:
            raise ConfigError(f"a window of {self.frames} latent frames cannot hold a sink of {self.sink}")

    def slot(self, frame: int) -> int:
        """Returns the slot of the frame with this global time index."""
        return frame if frame < self.sink else self.sink + (frame - self.sink) % (self.frames - self.sink)

    def slots(self, chunk: Chunk) -> list[int]:
        """Returns the slots that a chunk's frames own, in order of time.

        Raises:
            ConfigError: the chunk is larger than the ring and would overwrite itself.
        """
        ring = self.frames - self.sink
        if chunk.stop - max(chunk.start, self.sink) > ring:
            raise ConfigError(
                f"window {self.frames} is smaller than chunk + sink = {chunk.frames} + {self.sink} latent frames"
            )
        return [self.slot(frame) for frame in range(chunk.start, chunk.stop)]

    def ranges(self, chunk: Chunk, since: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        """Returns the slots that a chunk's queries read, as ranges [first, stop).

        Args:
            chunk: the chunk of the queries.
            since: a global time index.

        Returns:
            The ranges of slots that hold frames before `since`, and the ranges of the others.
        """
        sides: tuple[list[tuple[int, int]], list[tuple[int, int]]] = ([], [])
        for slot, frame in enumerate(self.held(chunk.stop)):
            side = sides[frame >= since]
            if side and side[-1][1] == slot:
                side[-1] = (side[-1][0], slot + 1)
            else:
                side.append((slot, slot + 1))
        return sides

    def positions(self, chunk: Chunk) -> list[int]:
        """Returns the position within the window of the frame in each slot: its number in order of time, from 0.

        The `relative` policy rotates keys by these positions, which are below `frames` however long the stream is. A
        slot that holds no frame yet has position 0.
        """
        held = self.held(chunk.stop)
        position = {frame: number for number, frame in enumerate(sorted(held))}
        return [position[frame] for frame in held] + [0] * (self.frames - len(held))

    def evicted(self, chunk: Chunk) -> list[int]:
        """Returns the global time indices of the frames whose slots a chunk overwrites."""
        ring = self.frames - self.sink
        return [f - ring for f in range(max(chunk.start, self.sink + ring), chunk.stop)]

    def held(self, stop: int) -> list[int]:
        """Returns the global time index of the frame in each slot once all frames before `stop` are written."""
        holders = {self.slot(frame): frame for frame in range(min(stop, self.sink))}
        ring = self.frames - self.sink
        holders |= {self.slot(frame): frame for frame in range(max(self.sink, stop - ring), stop)}
        return [holders[slot] for slot in range(len(holders))]
