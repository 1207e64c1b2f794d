"""The other ranks of this machine as the system sees them: there, stopped or gone. Needs neither torch nor a
connection, so that it can be asked from the first moment on.

A launcher such as torchrun starts one process a rank and gives each its number in the environment. On Linux those of
this machine are found among the launcher's children; elsewhere none is found, and nothing is said.
"""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

from causalrope_sp.rank_environment import RankEnvironment

STOPPED_S = 5.0  # how long a process may stand still before it counts as stopped
_PR_SET_PDEATHSIG = 1


class Siblings:
    """The ranks that the same launcher started on this machine, this one left out."""

    def __init__(self) -> None:
        self._rank, self._launcher = os.environ.get("RANK", "0"), os.getppid()
        self._expected = RankEnvironment.read().local_world_size - 1
        self._seen: dict[str, tuple[int, str]] = {}  # rank -> process id, and when it was started
        self._stopped_since: dict[str, float] = {}
        self._excused: dict[str, str] = {}  # rank -> the error that it told, empty without one
        self.last_words: Callable[[int], str | None] = lambda rank: None  # what a rank told before it was gone

    def lost(self) -> tuple[int, str] | None:
        """A rank that is gone, or has been stopped for `STOPPED_S`, and a sentence that says so; None if all
        go on. Ranks that are excused are left out."""
        if len(self._seen) < self._expected:
            self._look()
        for rank, (pid, born) in list(self._seen.items()):  # several threads ask
            if rank in self._excused:
                continue
            state = _state(pid, born)
            if state is None or state in "ZX":
                words = self.last_words(int(rank))
                said = f"; it {words}" if words else ""
                return int(rank), f"rank {rank} is gone: its process {pid} has ended{said}"
            if state != "T":
                self._stopped_since.pop(rank, None)
            elif time.monotonic() - self._stopped_since.setdefault(rank, time.monotonic()) > STOPPED_S:
                return int(rank), f"rank {rank} is stopped: its process {pid} has stood still for {STOPPED_S:g} s"
        return None

    def excuse(self, rank: int, error: str = "") -> None:
        """Tells that a rank has told its end, and by which error in words that follow its name: it may be gone."""
        self._excused[str(rank)] = error

    def failed(self) -> str | None:
        """A sentence that names a rank that has told that an error ends it; None without one."""
        return next((f"rank {rank} {error}" for rank, error in self._excused.items() if error), None)

    def end(self, rank: int) -> None:
        """Ends a rank's process, which a launcher would wait for as long as it is stopped."""
        pid, born = self._seen.get(str(rank), (0, ""))
        if pid and _state(pid, born) is not None:
            os.kill(pid, signal.SIGKILL)

    def _look(self) -> None:
        """Notes processes that the launcher started with the number of a rank."""
        for name in _names("/proc"):
            if not name.isdigit() or (fields := _fields(int(name))) is None or int(fields[1]) != self._launcher:
                continue
            rank = _environment(int(name)).get("RANK")
            if rank is not None and rank != self._rank:
                self._seen.setdefault(rank, (int(name), fields[19]))


def end_with_launcher() -> None:
    """Asks the system to send SIGTERM to this process when its launcher ends, however it ends; Linux alone does it."""
    if os.environ.get("WORLD_SIZE", "1") == "1" or os.uname().sysname != "Linux":
        return
    launcher = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != launcher:  # it ended before the system was asked
        os.kill(os.getpid(), signal.SIGTERM)


def _state(pid: int, born: str) -> str | None:
    """The letter that /proc gives a process, T if it is stopped; None if there is none, or another of the same
    number."""
    fields = _fields(pid)
    return fields[0] if fields is not None and fields[19] == born else None


def _fields(pid: int) -> list[str] | None:
    """What /proc/PID/stat says behind the process's name: state, parent, ..., the moment of its start."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except (OSError, IndexError):
        return None
    return fields if len(fields) > 19 else None


def _environment(pid: int) -> dict[str, str]:
    try:
        entries = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return {}
    return dict(entry.split("=", 1) for entry in entries if "=" in entry)


def _names(folder: str) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []
