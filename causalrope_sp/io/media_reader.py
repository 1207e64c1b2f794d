"""Reads images and videos, from files, PIL images, arrays or tensors, as uint8 RGB frames of the model's size and rate.

Size: a frame is scaled to cover the model's frame (by the larger of the two ratios, bicubic, antialiased), then cropped
around the centre; a frame that has the size already is not changed. Rate: each output frame is the source frame that a
player would show after a quarter of the output frame's duration, so that at equal, halved and doubled rates it is not
taken at the time when frames change. An image is rotated by its EXIF orientation, a video by its display matrix; what
is transparent is composited on black (`pixel_formats` converts every mode and format).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from fractions import Fraction
from typing import TYPE_CHECKING, Union

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from causalrope_sp.errors import InputError, first_line
from causalrope_sp.io.pixel_formats import frame_on_black, picture_on_black

if TYPE_CHECKING:
    from PIL import Image

Picture = Union[str, os.PathLike[str], np.ndarray, Tensor, "Image.Image"]
Video = str | os.PathLike[str] | Iterable[Union[np.ndarray, Tensor, "Image.Image"]]
MOST_PIXELS = 34_000_000  # of a picture or a frame; 8K has 33.2 million
# Of Pillow's formats those that people have: EPS starts a program, and others cost far more than their pixels.
PICTURES = ("PNG", "JPEG", "MPO", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "PPM", "TGA", "DDS")
LONGEST_ASPECT = 20  # of its longer side to its shorter one
LONGEST_SHOWN_S = 60  # how long a video may show one frame
TimedFrame = tuple[Fraction, Fraction, np.ndarray]  # start and end of its display, in seconds; uint8 (H, W, 3)


def read_picture(source: Picture, height: int, width: int) -> np.ndarray:
    """Reads an image and fits it to a size, see `fit`.

    Args:
        source: an image file of one of the kinds `PICTURES`, a PIL image, an array (H, W, 3), uint8 or float in [0, 1],
            or a tensor (3, H, W), float in [0, 1].
        height: of the result, in pixels.
        width: of the result, in pixels.

    Returns:
        The image, uint8 (height, width, 3).

    Raises:
        InputError: the file or the image cannot be read, or the array or tensor has another dtype, shape or range.
    """
    if not isinstance(source, str | os.PathLike):
        return fit(_to_uint8(source, height, width), height, width)
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        Image.init()
        with Image.open(source, formats=[kind for kind in PICTURES if kind in Image.OPEN]) as picture:
            check_size(*picture.size)
            picture.draft("RGB", (2 * width, 2 * height))  # JPEG alone: it is decoded at a fraction of its size
            kind = picture.format
            upright = ImageOps.exif_transpose(picture)
            return fit(picture_on_black(upright, kind, height, width), height, width)
    except InputError as error:
        raise InputError(f"cannot read {os.fspath(source)}: {error}") from error
    except UnidentifiedImageError as error:
        kinds = ", ".join(PICTURES)
        raise InputError(f"cannot read {os.fspath(source)}: not a picture of a known kind ({kinds})") from error
    except Exception as error:  # Pillow's decoders raise whatever their format's code does
        raise InputError(f"cannot read {os.fspath(source)}: {first_line(error)}") from error


def is_picture(value: object) -> bool:
    """Returns whether a value is a PIL image, an array or a tensor."""
    from PIL import Image

    return isinstance(value, np.ndarray | Tensor | Image.Image)


def _to_uint8(frame: object, height: int, width: int) -> np.ndarray:
    """Converts a PIL image, or a float array or tensor in [0, 1], to uint8.

    Args:
        frame: the frame.
        height: of the frame after `fit`, in pixels, to which a larger PIL image is reduced.
        width: likewise.

    Returns:
        The frame, uint8 (H, W, 3); an array that is not float is returned as it is.

    Raises:
        InputError: the image cannot be read or is too large, or a number is outside [0, 1].
    """
    from PIL import Image, ImageOps

    if isinstance(frame, Image.Image):
        check_size(*frame.size)
        try:
            return picture_on_black(ImageOps.exif_transpose(frame), frame.format, height, width)
        except InputError as error:
            raise InputError(f"cannot read a PIL image: {error}") from error
        except Exception as error:  # a lazily opened image is decoded here
            raise InputError(f"cannot read a PIL image: {first_line(error)}") from error
    if isinstance(frame, Tensor):
        frame = _channels_last(frame)
    if not isinstance(frame, np.ndarray) or frame.ndim != 3 or frame.shape[2] != 3 or 0 in frame.shape:
        return frame  # type: ignore[return-value]  # `fit` refuses it
    if not np.issubdtype(frame.dtype, np.floating):
        return frame
    check_size(frame.shape[1], frame.shape[0])
    if not ((frame >= 0) & (frame <= 1)).all():  # NaN too
        raise InputError(
            f"a frame of {frame.dtype} must have numbers in [0, 1], not {frame.min():g} to {frame.max():g}"
        )
    return np.rint(frame.astype(np.float32) * 255).astype(np.uint8)


def _channels_last(frame: Tensor) -> np.ndarray:
    """Returns a float tensor (3, H, W) as an array (H, W, 3); raises InputError for any other tensor."""
    if frame.ndim != 3 or frame.shape[0] != 3 or not frame.is_floating_point():
        got = f"{str(frame.dtype).removeprefix('torch.')} {tuple(frame.shape)}"
        raise InputError(
            "a frame that is a tensor must be float of shape (3, height, width), and a video of shape "
            f"(frames, 3, height, width), not {got}"
        )
    check_size(frame.shape[2], frame.shape[1])
    try:
        return frame.detach().to("cpu", torch.float32).movedim(0, 2).numpy()
    except Exception as error:  # a tensor without numbers, or of a layout that has no array
        raise InputError(f"cannot read a tensor: {first_line(error)}") from error


def check_size(width: int, height: int) -> None:
    """Checks the size of a picture or a frame before it is decoded.

    Raises:
        InputError: it has more than `MOST_PIXELS` pixels, or one side is more than `LONGEST_ASPECT` times the other.
    """
    if min(width, height) < 1 or width * height > MOST_PIXELS:
        raise InputError(f"it has {width}×{height} pixels; expected at most {MOST_PIXELS // 10**6} million")
    if max(width, height) > LONGEST_ASPECT * min(width, height):
        raise InputError(f"it has {width}×{height} pixels; expected sides of at most {LONGEST_ASPECT} to 1")


def read_video(source: Video, height: int, width: int, fps: float) -> Iterator[np.ndarray]:
    """Reads the frames of a video lazily and fits each to a size, see `fit`.

    Args:
        source: a video file, or frames that are at `fps` already: PIL images, arrays or tensors as in `read_picture`,
            or all of them in one array or tensor.
        height: of the result, in pixels.
        width: of the result, in pixels.
        fps: frames a second of the result.

    Returns:
        An iterator over the frames, uint8 (height, width, 3). It raises the errors as frames are taken from it.

    Raises:
        InputError: the file cannot be read, or a frame is refused as in `read_picture`.
    """
    if isinstance(source, np.ndarray | Tensor) and source.ndim != 4:
        raise InputError(f"a video must have 4 axes, frames first, not {source.ndim}: {tuple(source.shape)}")
    if not isinstance(source, str | os.PathLike):
        return (fit(_to_uint8(frame, height, width), height, width) for frame in source)
    fitted = ((start, end, fit(frame, height, width)) for start, end, frame in _file_frames(source))
    return _at_rate(fitted, fps)  # a frame that is shown several times is fitted once


def fit(frame: np.ndarray, height: int, width: int) -> np.ndarray:
    """Scales a frame to cover height×width pixels, then crops it around the centre.

    Args:
        frame: uint8 (H, W, 3).
        height: of the result, in pixels.
        width: of the result, in pixels.

    Returns:
        The frame, uint8 (height, width, 3); `frame` itself if it has the size.

    Raises:
        InputError: `frame` is not a uint8 array of shape (H, W, 3), or is empty.
    """
    if not isinstance(frame, np.ndarray) or frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
        got = f"{frame.dtype} {frame.shape}" if isinstance(frame, np.ndarray) else type(frame).__name__
        raise InputError(
            f"a frame must be a PIL image, an array (height, width, 3), uint8 or float, or a tensor, not {got}"
        )
    if 0 in frame.shape:
        raise InputError(f"a frame of {frame.shape[0]}×{frame.shape[1]} pixels is empty")
    check_size(frame.shape[1], frame.shape[0])
    if frame.shape[:2] == (height, width):
        return frame
    scale = max(height / frame.shape[0], width / frame.shape[1])
    size = max(height, round(frame.shape[0] * scale)), max(width, round(frame.shape[1] * scale))
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    fitted = np.empty((height, width, 3), np.uint8)
    for channel in range(3):  # one after the other, since floats take four times the memory
        pixels = torch.from_numpy(frame[None, None, ..., channel].astype(np.float32))
        scaled = interpolate(pixels, size, mode="bicubic", antialias=True, align_corners=False)
        cropped = scaled[0, 0, top : top + height, left : left + width]
        fitted[..., channel] = cropped.round().clamp(0, 255).numpy()
    return fitted


def _at_rate(timed: Iterator[TimedFrame], fps: float) -> Iterator[np.ndarray]:
    """Yields frames at another rate: for each output frame the source frame at a quarter of the output frame's
    duration."""
    rate, number = Fraction(fps).limit_denominator(1001), 0
    shown: np.ndarray | None = None
    shown_until = Fraction(0)
    for start, end, frame in timed:
        if start - max(shown_until, Fraction(0)) > LONGEST_SHOWN_S or end - start > LONGEST_SHOWN_S:
            raise InputError(f"a frame of the video is shown for more than {LONGEST_SHOWN_S} s")
        while shown is not None and (4 * number + 1) / (4 * rate) < start:
            yield shown
            number += 1
        shown, shown_until = frame, end
    while shown is not None and (4 * number + 1) / (4 * rate) < shown_until:
        yield shown
        number += 1


def _file_frames(path: str | os.PathLike[str]) -> Iterator[TimedFrame]:
    """Decodes the frames of a video file; times are relative to the first frame."""
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
            check_size(stream.width, stream.height)
            mean_duration, tick = 1 / (stream.average_rate or Fraction(25)), stream.time_base or Fraction(1)
            aspect = stream.sample_aspect_ratio
            check_size(round(stream.width * (aspect or 1)), stream.height)
            for n, frame in enumerate(container.decode(stream)):
                time = n * mean_duration if frame.pts is None else frame.pts * tick
                first = time if first is None else first
                pixels = frame_on_black(frame, aspect)
                yield time - first, time - first + (frame.duration * tick or mean_duration), pixels
    except InputError as error:
        raise InputError(f"cannot read {name}: {str(error).removeprefix(f'cannot read {name}: ')}") from error
    except Exception as error:  # decoders raise whatever their format's code does
        raise InputError(f"cannot read {name}: {first_line(error)}") from error


def _animated_picture(name: str) -> Iterator[TimedFrame]:
    """Decodes the frames of an animated WebP, which FFmpeg does not read."""
    from PIL import Image, ImageSequence

    start = Fraction(0)
    with Image.open(name, formats=["WEBP"]) as picture:
        check_size(*picture.size)
        for frame in ImageSequence.Iterator(picture):
            pixels = picture_on_black(frame, "WEBP", *frame.size[::-1])
            end = start + Fraction(frame.info.get("duration") or 40, 1000)
            yield start, end, pixels
            start = end
