"""Video files, written frame by frame while they are still being generated, so that no frame is lost that was made."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

import numpy as np

from causalrope_sp.checks import check_number, check_whole
from causalrope_sp.errors import OutputError, first_line
from causalrope_sp.io.output_files import check_replaceable
from causalrope_sp.io.partial_files import PartialFile, check_unwritten, partial_path
from causalrope_sp.io.video_sinks import FORMATS, STREAM, AvFile, PngFolder, Sink, lay_out

STDOUT = "-"

_log = logging.getLogger(__name__)


class VideoWriter:
    """Takes frames of one size as they come and writes them at once. Use it in a `with` block.

    Until `close` the video is in a file beside the target, clip.partial.mp4 for clip.mp4, which can be played at every
    moment: a process that is killed loses its last two frames. An error in the block leaves that file there; without an
    error, or after Ctrl-C, the file gets its name. Nothing is left where no frame was written. `frames` counts what was
    written.

    A finished file of the name is replaced then, not before. A second writer for the same path is refused as long as
    the first one has not ended.

    The same is true of GIF and WebM. A folder of pictures has one file a frame. WebP is written only at its end.

    Args:
        path: a .mp4 or .mov (H.264), .webm (VP9), .gif or .webp file, a folder of PNGs (a name that ends in /), or "-"
            for the standard output, which takes MP4 in fragments of a frame.
        height, width: pixels of a frame.
        fps: frames a second.

    Raises:
        ConfigError: `height` or `width` is not a whole number of at least 1, or `fps` is not a finite number above 0.
        OutputError: the kind of file is unknown, the file cannot be written, another writer is writing it, or the
            format cannot hold the size.
    """

    def __init__(self, path: str | os.PathLike[str], height: int, width: int, fps: float) -> None:
        height, width = check_whole("height", height), check_whole("width", width)
        fps = check_number("fps", fps, above=0)
        check_output(path, height, width)
        self.path, self.frames = _name(path), 0
        self._target = Path(os.path.abspath(path))
        self._shape = (height, width, 3)
        self._partial: PartialFile | None = None
        self._sink: Sink | None = None
        self._format = STREAM if self.path == STDOUT else FORMATS.get(self._target.suffix.lower())
        with self._failing_as_output_error():
            if self.path == STDOUT:
                self._sink = AvFile(sys.stdout.buffer, STREAM, height, width, fps)
                return
            self._partial = PartialFile(self._target, is_folder(path))
            if self._target.is_file():
                _log.info("%s is there; it is replaced when the new video is finished", self.path)
            if self._format is None or is_folder(path):
                self._sink = PngFolder(self._partial.path)
            else:
                self._sink = AvFile(self._partial.path, self._format, height, width, fps)

    @property
    def partial(self) -> str | None:
        """Where the frames are until the file has its name; None before and after."""
        return None if self._partial is None else str(self._target_name(self._partial.path))

    def write(self, frames: np.ndarray) -> None:
        """Appends uint8 frames of shape (T, height, width, 3), T ≥ 0.

        Raises:
            OutputError: frames of another kind, a writer that is closed, or a file that cannot be written or was
                removed; what was written before stays in the partial file.
        """
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[1:] != self._shape:
            shape = "×".join(map(str, self._shape))
            raise OutputError(f"{self.path} takes uint8 frames of T×{shape}, not {frames.dtype} {frames.shape}")
        if self._sink is None:
            raise OutputError(f"{self.path} is closed: no more frames can be written")
        if self._partial is not None and not self._partial.path.exists():  # an open file takes frames that nobody finds
            raise OutputError(f"cannot write {self.path}: {self.partial} was removed while it was being written")
        for frame in frames:
            with _uninterrupted(), self._failing_as_output_error():
                self._sink.add(np.ascontiguousarray(frame))
                self.frames += 1

    def close(self) -> None:
        """Finishes the file and gives it its name. Closing twice does nothing; without any frame nothing is made.

        Raises:
            OutputError: the file cannot be finished or named; the message says where the frames are.
        """
        if self._sink is None:
            return
        if self.frames == 0:
            self.discard()
            return
        with _uninterrupted(), self._failing_as_output_error():
            self._sink.finish()
            self._sink = None
            if self._partial is not None:
                self._name_it(self._partial.path)
                self._partial.release()
            self._partial = None

    def _name_it(self, partial: Path) -> None:
        """The partial file under the target's name; laid out as an ordinary file where that can be done."""
        final = partial
        if self._format is not None and self._format.final_options is not None and partial.is_file():
            final = partial.parent / f".causalrope-{secrets.token_hex(6)}.part"
            try:
                lay_out(partial, final, self._format)
            except Exception:  # no room for a second copy, say: the fragments are a file that can be played
                final.unlink(missing_ok=True)
                final = partial
        if self._target.is_dir() and partial.is_dir():
            self._target.rmdir()  # it was empty when the writer was opened
        try:
            os.replace(final, self._target)
        finally:
            if final != partial:
                final.unlink(missing_ok=True)
        if final != partial:
            partial.unlink(missing_ok=True)

    def abandon(self) -> None:
        """Ends the writer and leaves the frames in the partial file; removes it if there is none."""
        if self.frames == 0:
            self.discard()
            return
        sink, self._sink = self._sink, None
        with _uninterrupted(), contextlib.suppress(Exception):  # what is on disk can be played as it is
            if sink is not None:
                sink.finish()
        if self._partial is not None:
            self._partial.release()

    def discard(self) -> None:
        """Removes what was written; after `close` it does nothing."""
        sink, partial = self._sink, self._partial
        self._sink = self._partial = None
        with _uninterrupted():
            if sink is not None:
                with contextlib.suppress(Exception):  # the file is thrown away: why it cannot be finished is no news
                    sink.finish()
            if partial is not None:
                partial.remove()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None or issubclass(kind, KeyboardInterrupt):
            self.close()
        else:
            self.abandon()

    def _target_name(self, partial: Path) -> str:
        """A path beside the target, as the user wrote the target's."""
        return os.path.join(os.path.dirname(self.path.rstrip("/")), partial.name)

    @contextlib.contextmanager
    def _failing_as_output_error(self) -> Iterator[None]:
        import av

        try:
            yield
        except OutputError:
            raise
        except (OSError, ValueError, av.FFmpegError) as error:
            self.abandon()
            kept = f"; {self.frames} frames are in {self.partial}" if self.partial is not None and self.frames else ""
            raise OutputError(f"cannot write {self.path}: {first_line(error)}{kept}") from error


def check_output(path: str | os.PathLike[str], height: int | None = None, width: int | None = None) -> None:
    """Raises OutputError if `VideoWriter` would: call it before anything slow. The size can be checked when known."""
    name = _name(path)
    if name == STDOUT:
        if getattr(sys.stdout, "buffer", None) is None:
            raise OutputError("cannot write to the standard output: it is closed, or takes text alone")
        if sys.stdout.isatty():
            raise OutputError("cannot write a video to a terminal: send the standard output to a file or a program")
        _check_size(name, ".mp4", height, width)
        return
    try:
        target = Path(os.path.abspath(path))
        suffix = target.suffix.lower()
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
            check_replaceable(target)
            _check_size(name, suffix, height, width)
        if not target.parent.is_dir():
            raise OutputError(f"cannot write {name}: there is no folder {os.path.dirname(name.rstrip('/'))}")
        with contextlib.suppress(FileNotFoundError):
            os.stat(partial_path(target, is_folder(path)))  # its name may be too long where the target's is not
        probe = target.parent / f".causalrope-{secrets.token_hex(6)}.part"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise OutputError(f"cannot write {name}: {first_line(error)}") from error


def check_alone(path: str | os.PathLike[str]) -> None:
    """Raises OutputError if another run is writing the video of that path; ask before anything slow."""
    if _name(path) != STDOUT:
        check_unwritten(Path(os.path.abspath(path)), is_folder(path))


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
