"""Which cache slots are written and read: pure integer arithmetic, no storage, no state.

A frame's slot is a function of its global time index alone: the first `sink` frames keep their slots for ever, the
others go round the ring of the remaining slots, oldest first. What attention reads is then always a prefix of the
slots, because slots fill in order and, once full, all of them hold frames of the window.
"""

from __future__ import annotations

from dataclasses import dataclass

from causalrope_sp.errors import ConfigError
from causalrope_sp.grid import Chunk


@dataclass(frozen=True)
class SlidingWindow:
    """A window of `frames` latent frames, the current chunk counted, of which the stream's first `sink` are pinned.

    Raises:
        ConfigError: fewer than one frame, a negative sink, or no room beside the sink.
    """

    frames: int
    sink: int = 0

    def __post_init__(self) -> None:
        if self.frames < 1 or self.sink < 0 or self.sink >= self.frames:
            raise ConfigError(f"a window of {self.frames} latent frames cannot hold a sink of {self.sink}")

    def slot(self, frame: int) -> int:
        """Where the frame with this global time index lives."""
        return frame if frame < self.sink else self.sink + (frame - self.sink) % (self.frames - self.sink)

    def slots(self, chunk: Chunk) -> list[int]:
        """The slots that a chunk's frames own, in order of time.

        Raises:
            ConfigError: a chunk larger than the ring, which would overwrite itself.
        """
        ring = self.frames - self.sink
        if chunk.stop - max(chunk.start, self.sink) > ring:
            raise ConfigError(
                f"window {self.frames} is smaller than chunk + sink = {chunk.frames} + {self.sink} latent frames"
            )
        return [self.slot(frame) for frame in range(chunk.start, chunk.stop)]

    def ranges(self, chunk: Chunk, since: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        """The slots that a chunk's queries read, as stretches [first, stop): those that hold frames before the global
        time index `since`, and the others."""
        sides: tuple[list[tuple[int, int]], list[tuple[int, int]]] = ([], [])
        for slot, frame in enumerate(self.held(chunk.stop)):
            side = sides[frame >= since]
            if side and side[-1][1] == slot:
                side[-1] = (side[-1][0], slot + 1)
            else:
                side.append((slot, slot + 1))
        return sides

    def places(self, chunk: Chunk) -> list[int]:
        """Where the frame in each slot stands among those that a chunk's queries read, oldest first: its place in time
        for a stream that never leaves the window's range. 0 for a slot that holds none yet."""
        held = self.held(chunk.stop)
        order = {frame: place for place, frame in enumerate(sorted(held))}
        return [order[frame] for frame in held] + [0] * (self.frames - len(held))

    def evicted(self, chunk: Chunk) -> list[int]:
        """The global time indices of the frames whose slots a chunk takes over."""
        ring = self.frames - self.sink
        return [f - ring for f in range(max(chunk.start, self.sink + ring), chunk.stop)]

    def held(self, stop: int) -> list[int]:
        """The global time index in each slot once all frames before `stop` are written, slot by slot."""
        holders = {self.slot(frame): frame for frame in range(min(stop, self.sink))}
        ring = self.frames - self.sink
        holders |= {self.slot(frame): frame for frame in range(max(self.sink, stop - ring), stop)}
        return [holders[slot] for slot in range(len(holders))]
