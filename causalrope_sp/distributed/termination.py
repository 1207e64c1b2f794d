"""What a rank says when its launcher ends it because of another rank.

torchrun sends SIGTERM to all ranks as soon as one has failed. A rank that waits inside a collective runs no Python code
then; the system wakes a thread of its own through a pipe, which names the lost rank before the process ends.
"""

from __future__ import annotations

import os
import signal
import sys
import threading

from causalrope_sp.siblings import Siblings

SIGTERM_STATUS = 128 + signal.SIGTERM


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
    signal.signal(signal.SIGTERM, lambda *_: None)  # the thread acts
    threading.Thread(target=_end_on_sigterm, args=(reader, siblings), name="sigterm", daemon=True).start()


def _end_on_sigterm(reader: int, siblings: Siblings) -> None:
    while number := os.read(reader, 1):
        if number[0] != signal.SIGTERM:
            continue
        lost = siblings.lost()
        why = lost[1] if lost is not None else "its launcher sent SIGTERM"
        sys.stderr.write(f"error: rank {os.environ.get('RANK', '0')} ends: {why}\n")
        sys.stderr.flush()
        os._exit(SIGTERM_STATUS)
