"""Weights that change under the open streams of a pipeline, between two chunks of each.

What a stream has computed of the old weights and keeps is computed again: how it runs the model, the modulation of its
timesteps, and the keys and values of its text. Those of its cache are computed again only on request.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

from causalrope_sp.distributed import SequenceParallel
from causalrope_sp.errors import ConfigError
from causalrope_sp.pipeline.open_streams import OpenStreams
from causalrope_sp.pipeline.session import Session
from causalrope_sp.sampling.steered_loop import SteeredLoop


@contextmanager
def between_chunks(streams: OpenStreams, parallel: SequenceParallel, what: str) -> Iterator[list[SteeredLoop]]:
    """Runs the body when all ranks are about to do the same and no stream makes a chunk.

    Args:
        streams: the open streams of the pipeline.
        parallel: the ranks.
        what: what the ranks do, such as "changes its LoRAs".

    Yields:
        The streams of latents that have begun, in the order in which they were opened.

    Raises:
        ConfigError: a stream is in a call, is none that can be changed while it is made, or there are decode ranks; or
            the ranks have other streams, or are about to make different calls.
    """
    with ExitStack() as stack:
        if parallel.size == 1:
            stack.enter_context(streams.beginning)
        sessions = _begun(streams, parallel)
        for session in sessions:
            stack.enter_context(session.held())
        ahead = next((session for session in sessions if session.turns.ahead), None)
        stack.enter_context(parallel.turn(what) if ahead is None else ahead.turns.operation(what))
        if _begun(streams, parallel) != sessions:
            raise ConfigError("a stream of another thread began meanwhile: change the weights again")
        loops = [session.rested() for session in sessions]  # before any collective: what is made ahead has some too
        parallel.everyone.agree({"open streams": [session.turns.number for session in sessions]})
        yield loops


def _begun(streams: OpenStreams, parallel: SequenceParallel) -> list[Session]:
    """Returns the streams that have begun, in order. Raises ConfigError if one of all cannot be changed."""
    other = [stream for stream in streams if stream.is_open and not isinstance(stream, Session)]
    if other or (parallel.mesh.decode and len(streams)):
        why = "a video is coded" if other else "decode ranks go on as they began"
        raise ConfigError(f"a pipeline cannot change its weights under an open stream where {why}: close() it first")
    sessions = [stream for stream in streams if isinstance(stream, Session) and stream.has_begun]
    return sorted(sessions, key=lambda session: session.turns.number)


def change_weights(
    loops: Sequence[SteeredLoop], change: Callable[[], None], undo: Callable[[], None], *, recache: bool
) -> None:
    """Changes the weights of the models in place, and lets streams go on with the new ones.

    Args:
        loops: the streams, within `between_chunks`.
        change: changes the weights.
        undo: makes them what they were.
        recache: whether the keys and values of the windows are computed anew under the new weights.

    Raises:
        BaseException: what `change` raised, or what cut the work on the streams short. The weights are as they were,
            and a cache that was half written is computed anew.
    """
    changed, cut_short = False, not recache
    try:
        if not recache:
            for loop in loops:
                loop.commit()  # the newest chunk was made with the old weights, and so are its keys and values
        cut_short = False
        change()
        changed, cut_short = True, recache
        _renew(loops, recache)
    except BaseException:
        undo()
        if changed:
            _renew(loops, recache=False)
        for loop in loops if cut_short else ():
            loop.compute_anew()
        raise


def _renew(loops: Sequence[SteeredLoop], recache: bool) -> None:
    settled = loops[0].settle() if loops else ()
    for loop in loops:
        loop.renew_weights(settled, recache=recache)
