"""The clean latents of a stream's newest chunks and of its sink, from which its cache can be computed anew."""

from __future__ import annotations

from collections.abc import Iterator

from causalrope_sp.cache.window import SlidingWindow
from causalrope_sp.grid import Chunk
from causalrope_sp.sampling.pass_inputs import Part


class KeptLatents:
    """This rank's clean tokens of chunks with their control, in order of time.

    Args:
        frames: latent frames that are kept, the sink not counted; None keeps all.
    """

    def __init__(self, frames: int | None) -> None:
        self._frames = frames
        self._parts: list[Part] = []

    def add(self, part: Part, window: SlidingWindow) -> None:
        """Adds a finished chunk and lets go those that are too old, but for the sinks of shots that are not over."""
        self._parts.append(part)
        if self._frames is None:
            return
        oldest, held = part.chunk.stop - self._frames, set(window.held(part.chunk.stop).values())
        ends = [*window.shots[1:], part.chunk.stop + 1]
        begun = [shot for shot, end in zip(window.shots, ends, strict=True) if end > oldest]
        sinks = [range(shot, shot + window.sink) for shot in begun]
        self._parts = [
            p
            for p in self._parts
            if p.chunk.stop > oldest
            or any(_overlap(p.chunk, sink) for sink in sinks)
            or not held.isdisjoint(range(p.chunk.start, p.chunk.stop))
        ]

    def drop(self, start: int) -> None:
        """Forgets the chunks from the frame `start` on."""
        self._parts = [part for part in self._parts if part.chunk.stop <= start]

    @property
    def last(self) -> Part | None:
        """The newest chunk; None before the first one."""
        return self._parts[-1] if self._parts else None

    def fork(self) -> KeptLatents:
        """Returns the same latents for another stream."""
        fork = KeptLatents(self._frames)
        fork._parts = list(self._parts)
        return fork

    def __iter__(self) -> Iterator[Part]:
        return iter(self._parts)

    def newest(self) -> list[Part]:
        """Returns the newest chunks that are kept without a gap, in order of time."""
        parts: list[Part] = []
        for part in reversed(self._parts):
            if parts and part.chunk.stop != parts[-1].chunk.start:
                break
            parts.append(part)
        return parts[::-1]

    def part(self, chunk_index: int) -> Part | None:
        """Returns the tokens of a chunk; None if they are not kept."""
        return next((part for part in self._parts if part.chunk.index == chunk_index), None)

    def within(self, window: SlidingWindow, stop: int, *, with_sink: bool) -> list[Part]:
        """Returns what a window holds once all frames before `stop` are written, as far as it is kept.

        Args:
            window: the window.
            stop: a global time index.
            with_sink: whether the frames of the sink are among them.

        Returns:
            Chunks or the rest of chunks, in order of time, without a gap but after the sink.
        """
        first = min((part.chunk.start for part in self.newest()), default=stop)
        sink = window.sink_at(stop)
        wanted = [f for f in sorted(window.held(stop).values()) if (with_sink if f in sink else f >= first)]
        return [some for part in self._parts for some in _some_frames(part, wanted)]


def oldest_of(parts: list[Part], window: SlidingWindow, stop: int) -> int:
    """Returns the oldest frame of parts that is not of the window's sink at `stop`; `stop` if there is none."""
    sink = window.sink_at(stop)
    return min((f for p in parts for f in range(p.chunk.start, p.chunk.stop) if f not in sink), default=stop)


def _some_frames(part: Part, wanted: list[int]) -> Iterator[Part]:
    """Cuts the wanted frames out of a chunk, a part for every run of adjacent ones."""
    chunk = part.chunk
    runs: list[list[int]] = []
    for frame in (f for f in wanted if chunk.start <= f < chunk.stop):
        if runs and runs[-1][-1] == frame - 1:
            runs[-1].append(frame)
        else:
            runs.append([frame])
    for run in runs:
        yield part.cut(run[0], len(run))


def _overlap(chunk: Chunk, frames: range) -> bool:
    return chunk.start < frames.stop and frames.start < chunk.stop
