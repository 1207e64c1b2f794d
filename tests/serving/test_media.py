"""Chunks as bytes, judged by FFmpeg and Pillow."""

from __future__ import annotations

import io

import av
import numpy as np
import pytest
from PIL import Image

from causalrope_sp.errors import ConfigError
from causalrope_sp.serving.media import check_media, encode

FPS = 16.0


def moving(frames: int, height: int = 64, width: int = 96) -> np.ndarray:
    video = np.full((frames, height, width, 3), (20, 20, 30), np.uint8)
    for number, frame in enumerate(video):
        frame[10:40, 2 * number : 2 * number + 30] = (220, 40, 40)
    return video


def decoded(data: bytes) -> tuple[list[float], np.ndarray]:
    with av.open(io.BytesIO(data), "r") as file:
        frames = list(file.decode(video=0))
    return [float(frame.time or 0) * FPS for frame in frames], np.stack([f.to_ndarray(format="rgb24") for f in frames])


def test_each_piece_plays_alone_at_its_time() -> None:
    video = moving(12)
    piece = encode(video, 57, FPS, "mp4")
    times, frames = decoded(piece.parts[0])
    assert times == list(range(57, 69))
    assert np.abs(frames.astype(int) - video).mean() < 3
    assert piece.mime.startswith('video/mp4; codecs="avc1.4d'), "H.264's Main profile, which has CABAC"


def test_a_header_and_the_fragments_of_many_pieces_are_a_file() -> None:
    video = moving(21)
    first, second = encode(video[:9], 0, FPS, "mp4"), encode(video[9:], 9, FPS, "mp4")
    header = first.parts[0][: first.header_bytes]
    assert second.parts[0][: second.header_bytes] == header
    times, frames = decoded(first.parts[0] + second.parts[0][second.header_bytes :])
    assert times == list(range(21))
    assert np.abs(frames.astype(int) - video).mean() < 3
    assert b"moof" not in header
    assert second.parts[0][second.header_bytes + 4 : second.header_bytes + 8] == b"moof"


def test_jpeg_has_a_picture_a_frame() -> None:
    video = moving(3)
    piece = encode(video, 0, FPS, "jpeg")
    assert (len(piece.parts), piece.header_bytes, piece.mime) == (3, 0, "image/jpeg")
    pictures = np.stack([np.asarray(Image.open(io.BytesIO(part))) for part in piece.parts])
    assert np.abs(pictures.astype(int) - video).mean() < 3


def test_odd_sides_are_for_jpeg() -> None:
    with pytest.raises(ConfigError, match="media must be jpeg for frames with an odd side, 33×64 pixels, not mp4"):
        check_media("mp4", 64, 33)
    check_media("jpeg", 64, 33)
    assert len(encode(moving(2, 63, 97), 0, FPS, "jpeg").parts) == 2
