"""Computes which cache slots a chunk writes and reads: pure integer arithmetic without storage or state.

A frame's slot is a function of its global time index alone. The sink frames of a shot keep their slots until the next
shot begins; all other frames share the ring of the remaining slots, where the newest frame overwrites the oldest.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise

from causalrope_sp.errors import ConfigError
from causalrope_sp.grid import Chunk


@dataclass(frozen=True)
class SlidingWindow:
    """The latent frames that attention looks back over.

    Args:
        frames: the size of the window in latent frames, current chunk included.
        sink: how many of the first latent frames of the newest shot stay in the window.
        shots: the global time indices at which shots begin, in order; a stream that never sets a new sink has one.
        oldest: frames before this global time index are not in the window, but for a sink. A cache that was computed
            anew from the latents of a window holds no others.
        kept_shot: where a shot begins; the sinks of shots before it are not in the window.

    Raises:
        ConfigError: `frames` is below 1, `sink` is negative, or `sink` is not below `frames`.
    """

    frames: int
    sink: int = 0
    shots: tuple[int, ...] = (0,)
    oldest: int = 0
    kept_shot: int = 0
    _sink_frames: tuple[int, ...] = field(init=False, repr=False, compare=False)  # up to each shot, its own included

    def __post_init__(self) -> None:
        if self.frames < 1 or self.sink < 0 or self.sink >= self.frames:
            raise ConfigError(f"a window of {self.frames} latent frames cannot hold a sink of {self.sink}")
        before = accumulate((min(self.sink, end - begun) for begun, end in pairwise(self.shots)), initial=0)
        object.__setattr__(self, "_sink_frames", tuple(count + self.sink for count in before))

    @property
    def ring(self) -> int:
        """The slots that are not of the sink."""
        return self.frames - self.sink

    def sink_at(self, stop: int) -> range:
        """Returns the frames that stay in the window, of the newest shot that begins before the frame `stop`."""
        shot = self.shots[max(0, bisect_right(self.shots, stop - 1) - 1)]
        return range(shot, shot + self.sink)

    def since(self, oldest: int, stop: int) -> SlidingWindow:
        """Returns the window without the frames before `oldest`, but for the sink at the frame `stop`."""
        return replace(self, oldest=oldest, kept_shot=self.sink_at(stop).start)

    def shot(self, frame: int) -> SlidingWindow:
        """Returns the window in which a shot with a new sink begins at `frame`, which is not written yet."""
        return replace(self, shots=(*(begun for begun in self.shots if begun < frame), frame))

    def before(self, frame: int) -> SlidingWindow:
        """Returns the window as it was when `frame` was not written yet."""
        return replace(self, shots=tuple(begun for begun in self.shots if begun < frame) or self.shots[:1])

    def narrowed(self, frames: int, sink: int) -> SlidingWindow:
        """Returns the window of heads that see fewer frames of the same stream, or this one.

        Args:
            frames: how many they see.
            sink: how many of these are a shot's first ones. A window of the whole video has no sink of its own.
        """
        return self if frames >= self.frames else replace(self, frames=frames, sink=sink)

    def slot(self, frame: int) -> int:
        """Returns the slot of the frame with this global time index."""
        shots = bisect_right(self.shots, frame)
        of_shot = frame - self.shots[shots - 1]
        if of_shot < self.sink:
            return of_shot
        return self.sink + (frame - self._sink_frames[shots - 1]) % self.ring

    def slots(self, chunk: Chunk) -> list[int]:
        """Returns the slots that a chunk's frames own, in order of time.

        Raises:
            ConfigError: the chunk is larger than the ring and would overwrite itself.
        """
        slots = [self.slot(frame) for frame in range(chunk.start, chunk.stop)]
        if len(set(slots)) < len(slots):
            raise ConfigError(
                f"window {self.frames} is smaller than chunk + sink = {chunk.frames} + {self.sink} latent frames"
            )
        return slots

    def ranges(
        self, chunk: Chunk, since: int, chosen: Collection[int] | None = None
    ) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        """Returns the slots that a chunk's queries read, as ranges [first, stop).

        Args:
            chunk: the chunk of the queries.
            since: a global time index.
            chosen: the frames that they read of those that the window holds; None for all.

        Returns:
            The ranges of slots that hold frames before `since`, and the ranges of the others.
        """
        sides: tuple[list[tuple[int, int]], list[tuple[int, int]]] = ([], [])
        for slot, frame in self.held(chunk.stop).items():
            if chosen is not None and frame not in chosen:
                continue
            side = sides[frame >= since]
            if side and side[-1][1] == slot:
                side[-1] = (side[-1][0], slot + 1)
            else:
                side.append((slot, slot + 1))
        return sides

    def positions(self, chunk: Chunk, full: SlidingWindow | None = None) -> list[int]:
        """Returns the position within the window of the frame in each slot: its number in order of time, from 0.

        The `relative` policy rotates keys by these positions, which are below `frames` however long the stream is. A
        slot that holds no frame has position 0.

        Args:
            chunk: the chunk whose queries read.
            full: the window whose frames are numbered, of which this one holds some; None for this one.
        """
        held = self.held(chunk.stop)
        numbered = held if full is None else full.held(chunk.stop)
        position = {frame: number for number, frame in enumerate(sorted(numbered.values()))}
        return [position[held[slot]] if slot in held else 0 for slot in range(self.frames)]

    def held(self, stop: int) -> dict[int, int]:
        """Returns the global time index of the frame in each slot once all frames before `stop` are written.

        The slots are in order; those that hold no frame are missing.
        """
        sink, shot = self.sink, self.sink_at(stop).start
        frames = list(range(shot, min(stop, shot + sink))) if shot >= self.kept_shot else []
        more, frame = self.ring, stop - 1
        while more and frame >= self.oldest:
            begun = self.shots[bisect_right(self.shots, frame) - 1]
            if frame < begun + sink:  # a sink, of this shot or an earlier one
                frame = begun - 1
                continue
            frames.append(frame)
            more, frame = more - 1, frame - 1
        return dict(sorted((self.slot(frame), frame) for frame in frames))
