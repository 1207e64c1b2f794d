"""Computing a stream's cache anew from the clean latents of its window, chunk by chunk in order of time."""

from __future__ import annotations

from causalrope_sp.grid import Chunk
from causalrope_sp.sampling.guidance import GuidanceBranch
from causalrope_sp.sampling.kept_latents import KeptLatents, oldest_of


def recompute_window(branch: GuidanceBranch, kept: KeptLatents, stop: int, *, with_sink: bool) -> bool:
    """Computes the window of a branch anew; the context pass of the newest chunk stays pending.

    Args:
        branch: the branch, between two chunks.
        kept: the clean latents that are kept.
        stop: the global time index at which the next chunk starts.
        with_sink: whether the sink is computed anew too.

    Returns:
        Whether these are all frames so far.
    """
    return _recompute(branch, kept, stop, stop, with_sink=with_sink)


def recompute_all(branch: GuidanceBranch, kept: KeptLatents, stop: int) -> bool:
    """Computes the window of a branch anew with all frames that are kept, also those that it did not hold any more; see
    `recompute_window`."""
    cache = branch.stream.cache
    cache.window = cache.window.since(0, 0)
    return recompute_window(branch, kept, stop, with_sink=True)


def recompute_for(branch: GuidanceBranch, kept: KeptLatents, chunk: Chunk) -> None:
    """Computes anew what the next chunk will attend, but for the sink, once frames have left the window. They leave
    nothing behind: the frames that stay attend the sink and each other alone."""
    if len(branch.stream.cache.window.held(chunk.start)) < chunk.start:
        if newest_is_sink(branch, kept):
            branch.commit()
        _recompute(branch, kept, chunk.start, chunk.stop, with_sink=False)


def newest_is_sink(branch: GuidanceBranch, kept: KeptLatents) -> bool:
    """Returns whether frames of the newest chunk stay in the window as its sink."""
    last = kept.last
    if last is None:
        return False
    return last.chunk.start < branch.stream.cache.window.sink_at(last.chunk.stop).stop


def _recompute(branch: GuidanceBranch, kept: KeptLatents, stop: int, until: int, *, with_sink: bool) -> bool:
    """Recomputes the frames before `stop` that the window holds once all before `until` are written."""
    window = branch.stream.cache.window
    parts = kept.within(window, until, with_sink=with_sink)
    window = window.since(oldest_of(parts, window, stop), until)
    written = {frame for part in parts for frame in range(part.chunk.start, part.chunk.stop)}
    branch.recompute(parts, window, stop, anew=with_sink and written.issuperset(window.held(stop).values()))
    return sum(part.chunk.frames for part in parts) == stop
