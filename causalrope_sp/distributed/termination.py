"""What a rank says when its launcher ends it because of another rank.

torchrun sends SIGTERM to all ranks as soon as one has failed. A rank that waits inside a collective runs no Python code
in its main thread then; the system wakes another thread through a pipe, which names the lost rank and ends the process.
Where the pipe has been taken away, as asyncio's event loop does, the signal's handler does the same in the main thread.
"""

from __future__ import annotations

import os
import signal
import threading

from causalrope_sp.siblings import Siblings

SIGTERM_STATUS = 128 + signal.SIGTERM
STDERR = 2


def name_lost_rank_on_sigterm(siblings: Siblings) -> None:
    """From now on SIGTERM ends this process with a line that names the rank that is gone, if one is. Nothing happens
    where the program handles SIGTERM itself, or outside the main thread."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    if (other := signal.set_wakeup_fd(writer, warn_on_full_buffer=False)) != -1:  # somebody else's, such as asyncio's
        signal.set_wakeup_fd(other)
        os.close(reader)
        os.close(writer)
        return
    end = _End(siblings)
    signal.signal(signal.SIGTERM, lambda *_: end())
    threading.Thread(target=_end_on_sigterm, args=(reader, end), name="sigterm", daemon=True).start()


def _end_on_sigterm(reader: int, end: _End) -> None:
    while number := os.read(reader, 1):
        if number[0] == signal.SIGTERM:
            end()


class _End:
    """Ends the process with one line, whichever of the handler and the thread is first. It writes past `sys.stderr`,
    which the main thread may hold at this moment."""

    def __init__(self, siblings: Siblings) -> None:
        self._siblings, self._first = siblings, threading.Lock()

    def __call__(self) -> None:
        if not self._first.acquire(blocking=False):
            return
        try:
            lost = self._siblings.lost()
            why = lost[1] if lost is not None else self._siblings.failed() or "its launcher sent SIGTERM"
            os.write(STDERR, f"error: rank {os.environ.get('RANK', '0')} ends: {why}\n".encode())
        finally:
            os._exit(SIGTERM_STATUS)
