"""Conversion of pictures of every Pillow mode, and of video frames of every pixel format, to uint8 RGB on black.

A format is converted rightly or refused by its name: what is refused has no agreed white (32-bit integers, floats,
PQ video), needs a camera's data (Bayer patterns), or is one that FFmpeg's scaler converts wrongly.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np

from causalrope_sp.errors import InputError, first_line

if TYPE_CHECKING:
    import av
    from PIL import Image

_WITH_ALPHA = ("LA", "PA", "RGBA", "RGBa")
_SIXTEEN_BITS = ("PNG", "PPM")  # kinds of files whose 32-bit integers are 16 bits wide, which Pillow may open as I
# Floats, big-endian pixels of 12 to 16 bits and pixels of 4 bits come out of FFmpeg's scaler with errors or an abort.
_REFUSED_FORMATS = re.compile(r"bayer_.*|.*f(16|32)[bl]e|.*32[bl]e|(rgb|bgr)(444|555|565)be|(rgb|bgr)4(_byte)?")
_PQ = 16  # AVCOL_TRC_SMPTE2084


def picture_on_black(picture: Image.Image, kind: str | None, height: int, width: int) -> np.ndarray:
    """Converts a picture, and reduces it by a whole factor where it is more than four times too large.

    Args:
        picture: the picture, upright.
        kind: Pillow's name of its file format; None for one that is no file's.
        height: of the result after `fit`, in pixels.
        width: likewise.

    Returns:
        uint8 (H, W, 3); what is transparent is black.

    Raises:
        InputError: its mode has no agreed white.
    """
    if picture.mode.startswith("I;16") or (picture.mode == "I" and kind in _SIXTEEN_BITS):
        picture = _from_16_bits(picture)
    if picture.mode in ("I", "F"):
        what = "32-bit integers" if picture.mode == "I" else "floats"
        raise InputError(
            f"its pixels are {what} (mode {picture.mode}), of which no number is known to be white; expected 8 or 16 "
            "bits, or a float array in [0, 1]"
        )
    factor = min(picture.height // (4 * height), picture.width // (4 * width))
    clear = picture.mode in _WITH_ALPHA or "transparency" in picture.info
    if picture.mode == "La":
        picture, clear = picture.convert("LA"), True
    picture = picture.convert("RGBA" if clear else "RGB")
    picture = picture.reduce(factor) if factor > 1 else picture
    return np.asarray(picture.convert("RGBa"))[..., :3] if clear else np.asarray(picture)  # RGBa is RGB times alpha


def frame_on_black(frame: av.VideoFrame, pixel_aspect: Fraction | None) -> np.ndarray:
    """Converts a video frame with its own range and matrix, upright and with square pixels.

    Where a video does not say its matrix it is taken for BT.601 of limited range, as FFmpeg takes it.

    Args:
        frame: the decoded frame.
        pixel_aspect: width of a pixel to its height; None for square ones.

    Returns:
        uint8 (H, W, 3); what is transparent is black.

    Raises:
        InputError: its pixel format, its transfer function or its rotation is not converted.
    """
    name, components = frame.format.name, frame.format.components
    if _REFUSED_FORMATS.fullmatch(name):
        raise InputError(
            f"its pixel format {name} is not converted; expected integers of 8 to 16 bits, such as yuv420p"
        )
    if getattr(frame, "color_trc", None) == _PQ:
        raise InputError("it is HDR (PQ, SMPTE ST 2084), which needs tone mapping; convert it to SDR")
    clear = frame.format.has_palette or any(component.is_alpha for component in components)
    width = frame.width if not pixel_aspect else max(1, round(frame.width * pixel_aspect))
    try:
        pixels = frame.to_ndarray(format="rgba" if clear else "rgb24", width=width, height=frame.height)
    except (OSError, ValueError) as error:
        raise InputError(f"its pixel format {name} is not converted ({first_line(error)})") from error
    if clear:
        from PIL import Image

        pixels = np.asarray(Image.fromarray(pixels).convert("RGBa"))[..., :3]
    return _upright(pixels, frame)


def _from_16_bits(picture: Image.Image) -> Image.Image:
    """A grey picture of 16 bits as one of 8; its transparent colour, if it has one, becomes black."""
    from PIL import Image

    wide = np.array(picture, dtype=np.uint32)
    key = picture.info.get("transparency")
    if isinstance(key, int):
        wide[wide == key] = 0
    wide += 128  # 65535 is 255 · 257
    wide //= 257
    return Image.fromarray(wide.clip(max=255).astype(np.uint8))


def _upright(pixels: np.ndarray, frame: av.VideoFrame) -> np.ndarray:
    """Rotates and mirrors pixels by the video's display matrix, which maps x to a·x + c·y and y to b·x + d·y."""
    attached: Any = frame.side_data  # a sequence of items, which PyAV types as a mapping
    data = next((bytes(item) for item in attached if item.type.name == "DISPLAYMATRIX"), None)
    if data is None:
        return pixels
    a, b, _, c, d, *_ = (int(number) / 65536 for number in np.frombuffer(data, np.int32))
    if (abs(a), abs(b), abs(c), abs(d)) not in ((1, 0, 0, 1), (0, 1, 1, 0)):
        raise InputError(f"it is shown rotated by {frame.rotation}° or scaled; expected a multiple of 90°")
    if b:
        pixels = pixels.swapaxes(0, 1)
    down, right = (b, c) if b else (d, a)
    return np.ascontiguousarray(pixels[:: int(down), :: int(right)])
