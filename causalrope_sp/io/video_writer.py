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
import threading
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self

import numpy as np

from causalrope_sp.errors import OutputError

if TYPE_CHECKING:
    import av

# suffix -> container, codec, pixel format, codec options, container options
_FORMATS: dict[str, tuple[str, str, str, dict[str, str], dict[str, str]]] = {
    # crf 14: flat colours come back within a few steps of 255; the index goes first, so that a browser starts at once;
    # packets go to the disk as they come, so that a full disk is noticed at once
    ".mp4": (
        "mp4",
        "libx264",
        "yuv420p",
        {"crf": "14", "preset": "fast"},
        {"movflags": "+faststart", "flush_packets": "1"},
    ),
    ".gif": ("gif", "gif", "pal8", {}, {"loop": "0"}),
    ".webp": ("webp", "libwebp_anim", "bgra", {"quality": "90"}, {"loop": "0"}),
}
_LONGEST_SIDE = {".mp4": 16384, ".gif": 65535, ".webp": 16383}
_BT709 = 1  # the number of BT.709 as matrix, primaries and transfer alike (ITU-T H.273)


class VideoWriter:
    """Takes frames of one size as they come; the file appears under its name at `close`. Use it in a `with` block.

    `path` is a .mp4 (H.264), .gif or .webp file, or a folder of PNGs (a name that ends in /). Leaving the block
    normally or by KeyboardInterrupt keeps what was written (no frames: no file), any other exception removes it.
    `frames` counts what was written.

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
        self._part: Path | None = self._target.parent / f".causalrope-{secrets.token_hex(6)}.part"
        self._sink: _Sink | None = None
        suffix = None if is_folder(path) else self._target.suffix.lower()
        with self._failing_as_output_error():
            self._sink = _PngFolder(self._part) if suffix is None else _AvFile(self._part, suffix, height, width, fps)

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
        if self._sink is None or self._part is None:
            return
        if self.frames == 0:
            self.discard()
            return
        with _uninterrupted(), self._failing_as_output_error():
            self._sink.finish()
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
    try:
        if is_folder(path):
            if target.exists() and not target.is_dir():
                raise OutputError(f"cannot write {name}: a file of that name is in the way")
            if target.is_dir() and any(target.iterdir()):
                raise OutputError(f"cannot write {name}: the folder is there and not empty")
        elif suffix not in _FORMATS:
            kinds = ", ".join(_FORMATS)
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
        if not 1 <= pixels <= _LONGEST_SIDE[suffix]:
            raise OutputError(f"cannot write {name}: {side} {pixels}; {suffix} holds 1 to {_LONGEST_SIDE[suffix]}")
        if suffix == ".mp4" and pixels % 2:
            raise OutputError(f"cannot write {name}: {side} {pixels} is odd; .mp4 needs even sides, .webp does not")


def is_folder(path: str | os.PathLike[str]) -> bool:
    """Whether a video of that path is a folder of pictures."""
    name = os.fspath(path)
    return name.endswith("/") or (os.path.isdir(name) and Path(name).suffix.lower() not in _FORMATS)


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


class _Sink(Protocol):
    def add(self, frame: np.ndarray) -> None: ...

    def finish(self) -> None: ...


class _PngFolder:
    """000000.png, 000001.png, ..."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._count = folder, 0
        folder.mkdir()

    def add(self, frame: np.ndarray) -> None:
        import av

        codec = av.CodecContext.create("png", "w")
        assert isinstance(codec, av.VideoCodecContext)
        codec.height, codec.width, codec.pix_fmt, codec.time_base = *frame.shape[:2], "rgb24", Fraction(1)
        picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
        packets = [*codec.encode(picture), *codec.encode(None)]
        (self._folder / f"{self._count:06d}.png").write_bytes(b"".join(map(bytes, packets)))
        self._count += 1

    def finish(self) -> None:
        pass


class _AvFile:
    """One container with one video stream."""

    def __init__(self, path: Path, suffix: str, height: int, width: int, fps: float) -> None:
        import av

        container, codec, pixel_format, codec_options, container_options = _FORMATS[suffix]
        self._rate, self._count = Fraction(fps).limit_denominator(1001), 0
        self._container = av.open(str(path), "w", format=container, options=container_options)
        stream = self._container.add_stream(codec, rate=self._rate, options=codec_options)
        assert isinstance(stream, av.VideoStream)
        self._stream = stream
        stream.height, stream.width, stream.pix_fmt = height, width, pixel_format
        if suffix == ".mp4":
            context = stream.codec_context
            context.colorspace = context.color_primaries = context.color_trc = _BT709
            context.color_range = av.video.reformatter.ColorRange.MPEG
        self._format = pixel_format
        self._palette = _palette_graph(height, width, self._rate) if suffix == ".gif" else None
        self._container.start_encoding()  # now, not at the first frame: what cannot be written is said early

    def add(self, frame: np.ndarray) -> None:
        import av

        picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
        picture.pts, picture.time_base = self._count, 1 / self._rate
        self._count += 1
        if self._palette is None:
            self._encode(_converted(picture, self._format))
        else:
            self._palette.push(picture)
            self._encode_palette_frames()

    def finish(self) -> None:
        if self._palette is not None:
            self._palette.push(None)
            self._encode_palette_frames()
        self._encode(None)
        self._container.close()

    def _encode_palette_frames(self) -> None:
        import av

        assert self._palette is not None
        with contextlib.suppress(av.error.BlockingIOError, av.error.EOFError):
            while True:
                picture = self._palette.pull()
                assert isinstance(picture, av.VideoFrame)
                self._encode(picture)

    def _encode(self, picture: av.VideoFrame | None) -> None:
        self._container.mux(self._stream.encode(picture))


def _converted(picture: av.VideoFrame, pixel_format: str) -> av.VideoFrame:
    from av.video.reformatter import ColorRange, Colorspace

    if pixel_format != "yuv420p":
        return picture.reformat(format=pixel_format)
    return picture.reformat(format=pixel_format, dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG)


def _palette_graph(height: int, width: int, rate: Fraction) -> av.filter.Graph:
    """A palette for every frame: colours stay true and no frame has to wait for the last one."""
    import av.filter

    graph = av.filter.Graph()
    source = graph.add_buffer(width=width, height=height, format=av.VideoFormat("rgb24"), time_base=1 / rate)
    split, sink = graph.add("split"), graph.add("buffersink")
    make, use = graph.add("palettegen", "stats_mode=single"), graph.add("paletteuse", "new=1")
    source.link_to(split)
    split.link_to(use, 0, 0)
    split.link_to(make, 1, 0)
    make.link_to(use, 0, 1)
    use.link_to(sink)
    graph.configure()
    return graph
