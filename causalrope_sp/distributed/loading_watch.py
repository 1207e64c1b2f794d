"""Watches the other ranks of this machine while a rank loads and waits for them, before there is a connection."""

from __future__ import annotations

import threading
from collections.abc import Callable

from causalrope_sp.siblings import Siblings

EVERY_S = 0.5


class LoadingWatch:
    """Calls `on_loss` once, from a thread, with a line that names a rank of this machine that is gone or stopped.

    Args:
        siblings: the other ranks of this machine.
        on_loss: what to do then.
    """

    def __init__(self, siblings: Siblings, on_loss: Callable[[str], None]) -> None:
        self._siblings, self._on_loss = siblings, on_loss
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="loading watch", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ends the watch, before another takes over."""
        self._stopping.set()
        self._thread.join(2 * EVERY_S)

    def _watch(self) -> None:
        while not self._stopping.wait(EVERY_S):
            lost = self._siblings.lost()
            if lost is not None:
                self._siblings.end(lost[0])
                self._on_loss(lost[1])
                return
