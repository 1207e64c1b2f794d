"""Video files, written frame by frame while they are still being generated.

A writer works under a hidden name in the target's own folder and renames at the end, so a file that is there is
whole: an error leaves nothing behind, and Ctrl-C leaves the frames written so far as a playable file.
"""

from __future__ import annotations

import contextlib
import math
import os
import secrets
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

import numpy as np

from causalrope_sp.errors import OutputError
from causalrope_sp.io.video_sinks import FORMATS, STREAM, AvFile, PngFolder, Sink

STDOUT = "-"


class VideoWriter:
    """Takes frames of one size as they come; the file appears under its name at `close`. Use it in a `with` block.

    Leaving the block normally or by KeyboardInterrupt keeps what was written (no frames: no file), any other exception
    removes it. `frames` counts what was written.

    Args:
        path: a .mp4 or .mov (H.264), .webm (VP9), .gif or .webp file, a folder of PNGs (a name that ends in /), or "-"
            for the standard output, which takes MP4 in fragments of a frame.
        height, width: pixels of a frame.
        fps: frames a second.

    Raises:
        OutputError: the kind of file is unknown, the place cannot be written, or the format cannot hold the size.
    """

    def __init__(self, path: str | os.PathLike[str], height: int, width: int, fps: float) -> None:
        check_output(path, height, width)
        if not (math.isfinite(fps) and fps > 0):
            raise OutputError(f"cannot write {_name(path)}: {fps} frames a second; it must be more than 0")
        self.path, self.frames = _name(path), 0
        self._target = Path(os.path.abspath(path))
        self._shape = (height, width, 3)
        self._part: Path | None = None
        self._sink: Sink | None = None
        with self._failing_as_output_error():
            if self.path == STDOUT:
                self._sink = AvFile(sys.stdout.buffer, STREAM, height, width, fps)
                return
            self._part = self._target.parent / f".causalrope-{secrets.token_hex(6)}.part"
            if is_folder(path):
                self._sink = PngFolder(self._part)
            else:
                self._sink = AvFile(self._part, FORMATS[self._target.suffix.lower()], height, width, fps)

    def write(self, frames: np.ndarray) -> None:
        """Appends uint8 frames of shape (T, height, width, 3), T ≥ 0."""
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[1:] != self._shape:
            shape = "×".join(map(str, self._shape))
            raise OutputError(f"{self.path} takes uint8 frames of T×{shape}, not {frames.dtype} {frames.shape}")
        if self._sink is None:
            raise OutputError(f"{self.path} is closed: no more frames can be written")
        for frame in frames:
            with _uninterrupted(), self._failing_as_output_error():
                self._sink.add(np.ascontiguousarray(frame))
                self.frames += 1

    def close(self) -> None:
        """Finishes the file and gives it its name. Closing twice does nothing; without any frame nothing is made."""
        if self._sink is None:
            return
        if self.frames == 0:
            self.discard()
            return
        with _uninterrupted(), self._failing_as_output_error():
            self._sink.finish()
            if self._part is not None:
                if self._target.is_dir():
                    self._target.rmdir()  # checked to be empty when the writer was opened
                os.replace(self._part, self._target)
            self._sink = self._part = None

    def discard(self) -> None:
        """Removes what was written; after `close` it does nothing."""
        sink, part = self._sink, self._part
        self._sink = self._part = None
        with _uninterrupted():
            if sink is not None:
                with contextlib.suppress(Exception):  # the file is thrown away: why it cannot be finished is no news
                    sink.finish()
            if part is not None:
                _remove(part)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None or issubclass(kind, KeyboardInterrupt):
            self.close()
        else:
            self.discard()

    @contextlib.contextmanager
    def _failing_as_output_error(self) -> Iterator[None]:
        import av

        try:
            yield
        except (OSError, ValueError, av.FFmpegError) as error:
            self.discard()
            raise OutputError(f"cannot write {self.path}: {_reason(error)}") from error


def check_output(path: str | os.PathLike[str], height: int | None = None, width: int | None = None) -> None:
    """Raises OutputError if `VideoWriter` would: call it before anything slow. The size can be checked when known."""
    name, target = _name(path), Path(os.path.abspath(path))
    suffix = target.suffix.lower()
    if name == STDOUT:
        if sys.stdout.isatty():
            raise OutputError("cannot write a video to a terminal: send the standard output to a file or a program")
        _check_size(name, ".mp4", height, width)
        return
    try:
        if is_folder(path):
            if target.exists() and not target.is_dir():
                raise OutputError(f"cannot write {name}: a file of that name is in the way")
            if target.is_dir() and any(target.iterdir()):
                raise OutputError(f"cannot write {name}: the folder is there and not empty")
        elif suffix not in FORMATS:
            kinds = ", ".join(FORMATS)
            raise OutputError(f"cannot write {name!r}: its name must end in {kinds}, or in / for a folder of PNGs")
        elif target.is_dir():
            raise OutputError(f"cannot write {name}: a folder of that name is in the way")
        else:
            _check_size(name, suffix, height, width)
        if not target.parent.is_dir():
            raise OutputError(f"cannot write {name}: there is no folder {os.path.dirname(name.rstrip('/'))}")
        probe = target.parent / f".causalrope-{secrets.token_hex(6)}.part"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise OutputError(f"cannot write {name}: {_reason(error)}") from error


def _check_size(name: str, suffix: str, height: int | None, width: int | None) -> None:
    for side, pixels in (("height", height), ("width", width)):
        if pixels is None:
            continue
        longest = FORMATS[suffix].longest_side
        if not 1 <= pixels <= longest:
            raise OutputError(f"cannot write {name}: {side} {pixels}; {suffix} holds 1 to {longest}")
        if FORMATS[suffix].even and pixels % 2:
            raise OutputError(f"cannot write {name}: {side} {pixels} is odd; {suffix} needs even sides, .webp does not")


def is_folder(path: str | os.PathLike[str]) -> bool:
    """Whether a video of that path is a folder of pictures."""
    name = os.fspath(path)
    return name.endswith("/") or (os.path.isdir(name) and Path(name).suffix.lower() not in FORMATS)


def _name(path: str | os.PathLike[str]) -> str:
    return os.fspath(path)


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Holds back Ctrl-C and SIGTERM until the body is done, so that no frame and no file is left half written.

    Only the main thread gets signals, so in another thread there is nothing to hold back.
    """
    held: list[tuple[int, FrameType | None]] = []
    before: dict[signal.Signals, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            if callable(signal.getsignal(number)):  # else it is ignored, or the system's own business
                before[number] = signal.signal(number, lambda *received: held.append(received))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for received in held[:1]:
            before[signal.Signals(received[0])](*received)
