"""How many frames a chunk attends of those that are chosen by similarity: a number, or Light Forcing's schedule.

Light Forcing (arXiv 2602.04789) leaves more out of later chunks: chunk i attends the share 1 - s_i of its keys, with
s_i = s_base - α_i·β and α_i = 1/√(frames before it), and the first chunk all. β makes the chunks after the first leave
out `share` of their keys in all. s_base leaves a third as much as `share` does: .95 for the published .85.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

from causalrope_sp.cache.window import SlidingWindow
from causalrope_sp.config import NEWEST
from causalrope_sp.grid import Chunk


def top_frames(similar: float, sink: int, window: SlidingWindow, chunks: Sequence[Chunk]) -> Callable[[Chunk], int]:
    """Returns the function that says how many frames a chunk attends beyond the sink, the newest frame and itself.

    Args:
        similar: `StreamConfig.similar_frames`.
        sink: the frames of the sink.
        window: the window of the stream.
        chunks: all chunks of the video, or those of a stream without end until the window is full.
    """
    if similar >= 1 or similar == 0:
        return lambda chunk: int(similar)
    base, beta = 1 - (1 - similar) / 3, _beta(similar, window, chunks)

    @cache
    def top(chunk: Chunk) -> int:
        held = len(window.held(chunk.stop))
        if chunk.start == 0:
            return held
        left_out = min(1.0, max(0.0, base - beta * chunk.start**-0.5))
        fixed = min(sink, chunk.start) + NEWEST + chunk.frames
        return max(0, round((1 - left_out) * held) - fixed)

    return top


def _beta(share: float, window: SlidingWindow, chunks: Sequence[Chunk]) -> float:
    """β, for which Σ (1 - s_i)·l_i = (1 - share)·Σ l_i over the chunks after the first, l_i = queries · keys."""
    work = {chunk.start: chunk.frames * len(window.held(chunk.stop)) for chunk in chunks if chunk.start}
    weighted = sum(count * start**-0.5 for start, count in work.items())
    base = 1 - (1 - share) / 3
    return (base - share) * sum(work.values()) / weighted if weighted else 0.0
