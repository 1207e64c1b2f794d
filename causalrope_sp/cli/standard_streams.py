"""The standard streams of a process: what cannot be written to them ends in one sentence or in silence, no traceback.

A reader that has left, such as `head`, has read what it wanted: the command goes on in silence and keeps its status.
"""

from __future__ import annotations

import codecs
import contextlib
import errno
import io
import os
import sys
from collections.abc import Iterator
from typing import TextIO

from causalrope_sp.errors import OutputError, first_line


class _GuardedText(io.TextIOWrapper):
    """Text to a standard stream. After an error all further text goes to the null device.

    Args:
        stream: the stream, which cannot be used any more.
        raises: whether an error other than a reader that has left raises OutputError.
    """

    def __init__(self, stream: TextIO, raises: bool) -> None:
        self._number, self._raises = stream.fileno(), raises
        encoding = "utf-8" if codecs.lookup(stream.encoding).name == "ascii" else stream.encoding
        lines = bool(getattr(stream, "line_buffering", False))
        super().__init__(stream.detach(), encoding, errors="backslashreplace", line_buffering=lines)  # type: ignore[attr-defined]

    def write(self, text: str) -> int:
        with self._guarded():
            super().write(text)
        return len(text)

    def flush(self) -> None:
        with self._guarded():
            super().flush()

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._number)
            os.close(null)
            if self._raises and not isinstance(error, BrokenPipeError):
                reason = "it is closed" if error.errno == errno.EBADF else first_line(error)
                raise OutputError(f"cannot write to the standard output: {reason}") from error


def guard_standard_streams() -> None:
    """Guards the standard output and the standard error of this process.

    Streams that the caller closed are opened first, for reading alone, so that writing fails: else the next file that
    is opened, such as the video, would be what libraries take for the standard output.
    """
    while (opened := os.open(os.devnull, os.O_RDONLY)) <= 2:
        pass
    os.close(opened)
    stdout = sys.stdout or open(1, "w", closefd=False)  # noqa: SIM115  # open as long as the process runs
    stderr = sys.stderr or open(2, "w", closefd=False)  # noqa: SIM115
    sys.stdout, sys.stderr = _GuardedText(stdout, raises=True), _GuardedText(stderr, raises=False)
