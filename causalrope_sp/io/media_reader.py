"""Pictures and videos in: files, or arrays, as uint8 frames of the model's size and rate.

Size: scaled to cover the model's picture (the larger of the two ratios, bicubic, antialiased), then cropped around the
centre; what has the size already is taken bit for bit. Rate: the frame that a player would show a quarter into every
frame's time, so that equal, halved and doubled rates stay clear of the moment when frames change. A picture is turned
as its EXIF data say, a video as its display matrix says; a transparent picture lies on black.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from fractions import Fraction
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn.functional import interpolate

from causalrope_sp.errors import InputError

if TYPE_CHECKING:
    import av

Picture = str | os.PathLike[str] | np.ndarray
Video = str | os.PathLike[str] | Iterable[np.ndarray]
TimedFrame = tuple[Fraction, Fraction, np.ndarray]  # shown from, until, in seconds; uint8 (H, W, 3)


def read_picture(source: Picture, height: int, width: int) -> np.ndarray:
    """A picture file, or uint8 (H, W, 3), as uint8 (height, width, 3).

    Raises:
        InputError: it cannot be read, or is no such array.
    """
    if isinstance(source, np.ndarray):
        return fit(source, height, width)
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(source) as picture:
            upright = ImageOps.exif_transpose(picture).convert("RGBA")
    except UnidentifiedImageError as error:
        raise InputError(f"cannot read {os.fspath(source)}: not a picture of a known kind") from error
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"cannot read {os.fspath(source)}: {_reason(error)}") from error
    black = Image.new("RGBA", upright.size, "black")
    return fit(np.asarray(Image.alpha_composite(black, upright).convert("RGB")), height, width)


def read_video(source: Video, height: int, width: int, fps: float) -> Iterator[np.ndarray]:
    """The frames of a video file, or of uint8 (H, W, 3) arrays that are at `fps` already, one by one as they are asked
    for, uint8 (height, width, 3).

    Raises:
        InputError: it cannot be read, or a frame is no such array.
    """
    frames = _at_rate(_file_frames(source), fps) if isinstance(source, str | os.PathLike) else iter(source)
    return (fit(frame, height, width) for frame in frames)


def fit(frame: np.ndarray, height: int, width: int) -> np.ndarray:
    """Scaled to cover height×width, cropped around the centre.

    Raises:
        InputError: not a uint8 array of shape (H, W, 3).
    """
    if not isinstance(frame, np.ndarray) or frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
        given = f"{frame.dtype} {frame.shape}" if isinstance(frame, np.ndarray) else type(frame).__name__
        raise InputError(f"a frame must be uint8 of shape (height, width, 3), not {given}")
    if 0 in frame.shape:
        raise InputError(f"a frame of {frame.shape[0]}×{frame.shape[1]} pixels is empty")
    if frame.shape[:2] == (height, width):
        return frame
    scale = max(height / frame.shape[0], width / frame.shape[1])
    size = max(height, round(frame.shape[0] * scale)), max(width, round(frame.shape[1] * scale))
    pixels = torch.from_numpy(frame.copy()).movedim(2, 0).unsqueeze(0).float()
    scaled = interpolate(pixels, size, mode="bicubic", antialias=True, align_corners=False)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    cropped = scaled[0, :, top : top + height, left : left + width]
    return cropped.round().clamp(0, 255).to(torch.uint8).movedim(0, 2).numpy()


def _at_rate(timed: Iterator[TimedFrame], fps: float) -> Iterator[np.ndarray]:
    """Frames at another rate: for each one wanted, the one shown a quarter into its time."""
    rate, wanted = Fraction(fps).limit_denominator(1001), 0
    shown: np.ndarray | None = None
    until = Fraction(0)
    for start, end, frame in timed:
        while shown is not None and (4 * wanted + 1) / (4 * rate) < start:
            yield shown
            wanted += 1
        shown, until = frame, end
    while shown is not None and (4 * wanted + 1) / (4 * rate) < until:
        yield shown
        wanted += 1


def _file_frames(path: str | os.PathLike[str]) -> Iterator[TimedFrame]:
    import av

    name = os.fspath(path)
    try:
        if os.path.splitext(name)[1].lower() == ".webp":
            yield from _animated_picture(name)
            return
        with av.open(name) as container:
            if not container.streams.video:
                raise InputError(f"cannot read {name}: it holds no video")
            stream, first = container.streams.video[0], None
            usual, tick = 1 / (stream.average_rate or Fraction(25)), stream.time_base or Fraction(1)
            for n, frame in enumerate(container.decode(stream)):
                time = n * usual if frame.pts is None else frame.pts * tick
                first = time if first is None else first
                yield time - first, time - first + (frame.duration * tick or usual), _upright(frame)
    except InputError:
        raise
    except (OSError, ValueError, EOFError, av.FFmpegError) as error:
        raise InputError(f"cannot read {name}: {_reason(error)}") from error


def _animated_picture(name: str) -> Iterator[TimedFrame]:
    """An animated WebP, which FFmpeg does not read."""
    from PIL import Image, ImageSequence

    start = Fraction(0)
    with Image.open(name) as picture:
        for frame in ImageSequence.Iterator(picture):
            pixels = np.asarray(frame.convert("RGB"))
            end = start + Fraction(frame.info.get("duration") or 40, 1000)
            yield start, end, pixels
            start = end


def _upright(frame: av.VideoFrame) -> np.ndarray:
    return np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90))


def _reason(error: BaseException) -> str:
    return getattr(error, "strerror", None) or (str(error).splitlines() or [type(error).__name__])[0]
