"""Chunks as bytes for a viewer: a piece of MP4 that can stand alone, or JPEG pictures."""

from __future__ import annotations

import io
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from causalrope_sp.errors import ConfigError
from causalrope_sp.io.video_sinks import FORMATS, AvFile, Format

if TYPE_CHECKING:
    import numpy as np

Media = Literal["mp4", "jpeg"]
JPEG_QUALITY = 90

# Each chunk is a file of its own: a header that is the same for all of them, and one fragment with the frames' times in
# the whole video. Media Source Extensions take it as it is at any place, and header + fragments is a file.
# The fastest preset with CABAC gives smaller files of the same quality than "veryfast" does at this CRF, in two thirds
# of the time; the tables of CAVLC, which it would use, take longer to be made than a small chunk takes to be encoded.
_FILE_OPTIONS = FORMATS[".mp4"].codec_options
_FAST = {"preset": "ultrafast", "tune": "zerolatency", "x264-params": f"{_FILE_OPTIONS['x264-params']}:cabac=1"}
_PIECE = Format(
    "mp4",
    "libx264",
    "yuv420p",
    {**_FILE_OPTIONS, **_FAST},
    {
        "movflags": "+frag_keyframe+empty_moov+default_base_moof+frag_discont+skip_trailer",
        "avoid_negative_ts": "disabled",  # with frag_discont; else the times of every piece start at 0
    },
)


@dataclass(frozen=True)
class Piece:
    """A chunk as bytes.

    Args:
        parts: binary messages: one piece of MP4, or a JPEG a frame.
        header_bytes: how many bytes at the start of a piece of MP4 are its header; 0 for JPEG.
        mime: the type of a part, for Media Source Extensions.
    """

    parts: list[bytes]
    header_bytes: int
    mime: str


def check_media(media: Media, height: int, width: int) -> None:
    """Raises ConfigError if frames of this size cannot be sent so."""
    if media == "mp4" and (height % 2 or width % 2):
        raise ConfigError(f"media must be jpeg for frames with an odd side, {width}×{height} pixels, not mp4")


def encode(frames: np.ndarray, first_frame: int, fps: float, media: Media) -> Piece:
    """Encodes a chunk.

    Args:
        frames: uint8 (T, H, W, 3).
        first_frame: the number of the first one in the video.
        fps: pixel frames per second.
        media: "mp4" for H.264 in fragmented MP4, "jpeg" for a picture a frame.

    Returns:
        The bytes.
    """
    if media == "jpeg":
        return Piece([_jpeg(frame) for frame in frames], 0, "image/jpeg")
    height, width = frames.shape[1:3]
    target = io.BytesIO()
    file = AvFile(target, _PIECE, height, width, fps, first_frame)
    for frame in frames:
        file.add(frame)
    file.finish()
    data = target.getvalue()
    header = _header_bytes(data)
    return Piece([data], header, f'video/mp4; codecs="{_codec(data[:header])}"')


def _jpeg(frame: np.ndarray) -> bytes:
    from PIL import Image

    target = io.BytesIO()
    Image.fromarray(frame).save(target, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return target.getvalue()


def _header_bytes(data: bytes) -> int:
    """Returns how many bytes precede the first fragment: the boxes ftyp and moov."""
    position = 0
    while data[position + 4 : position + 8] != b"moof":
        position += struct.unpack(">I", data[position : position + 4])[0]
    return position


def _codec(header: bytes) -> str:
    """Returns the codec's name (RFC 6381) from the box avcC: profile, constraints and level."""
    start = header.index(b"avcC") + 5
    return f"avc1.{header[start : start + 3].hex()}"
