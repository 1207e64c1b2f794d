"""Partial files: what a video is written into until it has its name, and that one process alone writes a video."""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
from pathlib import Path

from causalrope_sp.errors import OutputError

MOST_PARTIALS = 100

_log = logging.getLogger(__name__)


class PartialFile:
    """A new file or folder beside a target: clip.partial.mp4 for clip.mp4, or clip.partial-2.mp4, ...

    It is locked until `release`, or until the process ends in whatever way, so that others see that it is being
    written. Where the file system has no locks, nothing is seen.

    Args:
        target: the path that it is to have in the end.
        folder: whether it is a folder.

    Attributes:
        path: where it is.

    Raises:
        OutputError: another run is writing the target, or there are `MOST_PARTIALS` files of it.
        OSError: it cannot be made.
    """

    def __init__(self, target: Path, folder: bool) -> None:
        for number in range(1, MOST_PARTIALS + 1):
            self.path = partial_path(target, folder, number)
            try:
                if folder:
                    self.path.mkdir()
                else:
                    self.path.touch(exist_ok=False)
            except FileExistsError:
                continue
            self._lock = _locked(self.path, fcntl.LOCK_EX)
            break
        else:
            raise OutputError(f"cannot write {target}: {MOST_PARTIALS} partial files of it are there")
        try:
            for other in check_unwritten(target, folder, but=self.path):
                _log.warning("%s is there from a run that ended early; it is kept", other)
        except OutputError:
            self.remove()
            raise

    def release(self) -> None:
        """Gives the lock back: nothing more is written."""
        if self._lock is not None:
            os.close(self._lock)
        self._lock = None

    def remove(self) -> None:
        """Removes the file or folder, if it is there."""
        if self.path.is_dir():
            shutil.rmtree(self.path, ignore_errors=True)
        else:
            self.path.unlink(missing_ok=True)
        self.release()


def partial_path(target: Path, folder: bool, number: int = 1) -> Path:
    """Returns the path of a target's partial file of a number from 1 on."""
    stem, suffix = (target.name, "") if folder else (target.stem, target.suffix)
    return target.with_name(f"{stem}.partial{'' if number == 1 else f'-{number}'}{suffix}")


def check_unwritten(target: Path, folder: bool, but: Path | None = None) -> list[Path]:
    """Checks that no run is writing a target.

    Args:
        target: the path.
        folder: whether it is a folder of pictures.
        but: a partial file of this run.

    Returns:
        The partial files of runs that ended early.

    Raises:
        OutputError: another run, or another writer of this process, is writing the target.
    """
    left = []
    for number in range(1, MOST_PARTIALS + 1):
        partial = partial_path(target, folder, number)
        if partial == but or not partial.exists():
            continue
        try:
            lock = _locked(partial, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared: two that ask do not see each other
        except FileNotFoundError:  # it has got its name meanwhile
            continue
        except PermissionError:  # another user's, which may be in use
            raise OutputError(f"cannot write {target}: {partial} is there, and its owner alone may read it") from None
        if lock is None:
            raise OutputError(f"cannot write {target}: another run is writing it, in {partial}")
        os.close(lock)
        left.append(partial)
    return left


def _locked(path: Path, how: int) -> int | None:
    """The descriptor of a file or folder that is locked from now on, as flock says; None if another has it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, how)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except OSError:  # a file system without locks
        return descriptor
    return descriptor
