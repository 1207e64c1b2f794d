"""Pictures and videos in: the rule by which they get the model's size and rate, and what cannot be read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image

from causalrope_sp import InputError
from causalrope_sp.io.media_reader import fit, read_picture, read_video
from causalrope_sp.io.video_writer import VideoWriter


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def counting(frames: int) -> np.ndarray:
    """Frame n is grey of level 10n."""
    return np.repeat(np.arange(frames, dtype=np.uint8) * 10, 32 * 48 * 3).reshape(frames, 32, 48, 3)


@pytest.mark.parametrize("size", [(64, 64), (128, 64), (64, 200), (97, 201), (31, 77), (20, 20), (640, 480), (63, 64)])
def test_scaled_to_cover_and_cropped_around_the_centre(size: tuple[int, int]) -> None:
    """Against Pillow's own antialiased bicubic filter, away from black and white, where it clips in between."""
    height, width = 64, 48
    frame = picture(*size) // 2 + 64
    scale = max(height / size[0], width / size[1])
    scaled = max(width, round(size[1] * scale)), max(height, round(size[0] * scale))
    assert min(scaled[0] - width, scaled[1] - height) == 0
    whole = np.asarray(Image.fromarray(frame).resize(scaled, Image.Resampling.BICUBIC)).astype(int)
    top, left = (scaled[1] - height) // 2, (scaled[0] - width) // 2
    expected = whole[top : top + height, left : left + width]
    assert np.abs(fit(frame, height, width).astype(int) - expected).max() <= 1


def test_what_fits_is_taken_as_it_is(tmp_path: Path) -> None:
    frame = picture(64, 48)
    assert np.array_equal(fit(frame, 64, 48), frame)
    Image.fromarray(frame).save(tmp_path / "a.png")
    assert np.array_equal(read_picture(tmp_path / "a.png", 64, 48), frame)
    assert np.array_equal(read_picture(frame, 64, 48), frame)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_float_frames_are_the_uint8_frames(dtype: type[np.floating[Any]]) -> None:
    frame = np.arange(256 * 3, dtype=np.int64).reshape(16, 16, 3).astype(np.uint8)
    scaled = (frame / 255).astype(dtype)
    assert np.array_equal(read_picture(scaled, 16, 16), frame)
    assert all(np.array_equal(read, frame) for read in read_video(np.stack([scaled] * 2), 16, 16, 16))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_float_tensors_are_the_frames_of_their_arrays(dtype: torch.dtype) -> None:
    """Channels first, as diffusers' pipelines return them. bfloat16 holds 256 levels only roughly."""
    frames = np.stack([picture(16, 24, seed) for seed in range(2)])
    tensors = torch.from_numpy(frames).movedim(3, 1).to(dtype).div(255).requires_grad_()
    off = 1 if dtype == torch.bfloat16 else 0
    for size in ((16, 24), (8, 8)):
        first = read_picture(tensors[0], *size).astype(int)
        assert np.abs(first - read_picture(frames[0], *size)).max() <= off
        read = np.stack(list(read_video(tensors, *size, 16))).astype(int)
        assert np.abs(read - np.stack(list(read_video(frames, *size, 16)))).max() <= off


@pytest.mark.parametrize("size", [(16, 24), (30, 70), (640, 480)])
def test_pil_images_are_read_as_their_files(tmp_path: Path, size: tuple[int, int]) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    Image.fromarray(picture(*size)).save(tmp_path / "a.png", exif=exif)
    Image.fromarray(picture(*size)).convert("RGBA").save(tmp_path / "b.png")
    Image.fromarray(picture(*size)).convert("L").save(tmp_path / "c.png")
    images = [Image.open(tmp_path / f"{name}.png") for name in "abc"]
    expected = [read_picture(tmp_path / f"{name}.png", 24, 16) for name in "abc"]
    assert np.array_equal([read_picture(image, 24, 16) for image in images], expected)
    assert np.array_equal(list(read_video(images, 24, 16, 16)), expected)


def test_a_fine_pattern_becomes_grey() -> None:
    """Without a filter it would alias to black and white."""
    stripes = np.zeros((256, 256, 3), np.uint8)
    stripes[:, ::2] = 255
    assert np.abs(fit(stripes, 64, 64).astype(int) - 127.5).max() < 20


def test_pictures_are_turned_as_the_camera_was_held_and_lie_on_black(tmp_path: Path) -> None:
    frame = picture(16, 24)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    Image.fromarray(frame).save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(read_picture(tmp_path / "turned.png", 24, 16), np.rot90(frame, -1))
    Image.new("RGBA", (16, 16), (200, 100, 50, 0)).save(tmp_path / "clear.png")
    assert not read_picture(tmp_path / "clear.png", 16, 16).any()


@pytest.mark.parametrize("name", ["a.mp4", "a.gif", "a.webp"])
@pytest.mark.parametrize(("fps", "wanted"), [(16, range(10)), (8, range(0, 10, 2)), (32, [n // 2 for n in range(20)])])
def test_videos_are_read_at_another_rate(tmp_path: Path, name: str, fps: int, wanted: range | list[int]) -> None:
    """What was written at 16 frames a second, in a .gif by hundredths of a second."""
    frames = counting(10)
    with VideoWriter(tmp_path / name, 32, 48, 16) as video:
        video.write(frames)
    read = list(read_video(tmp_path / name, 32, 48, fps))
    assert [round(frame.mean() / 10) for frame in read] == list(wanted)
    assert all(frame.dtype == np.uint8 and frame.shape == (32, 48, 3) for frame in read)


def test_a_video_is_read_as_it_is_asked_for() -> None:
    taken: list[int] = []

    def frames() -> Iterator[np.ndarray]:
        for n, frame in enumerate(counting(5)):
            taken.append(n)
            yield frame

    video = read_video(frames(), 16, 16, 16)
    next(video)
    next(video)
    assert taken == [0, 1]


NOT_FRAMES: Any = [[1, 2]]


@pytest.mark.parametrize(
    ("read", "says"),
    [
        (lambda folder: read_picture(folder / "text.png", 8, 8), "text.png: not a picture of a known kind"),
        (lambda folder: read_picture(folder / "none.png", 8, 8), "none.png: No such file"),
        (lambda folder: read_picture(folder / "cut.png", 8, 8), r"cannot read .*cut.png"),
        (
            lambda folder: read_picture(np.zeros((8, 8)), 8, 8),
            r"a frame must be a PIL image, .* not float64 \(8, 8\)",
        ),
        (lambda folder: read_picture(np.zeros((0, 8, 3), np.uint8), 8, 8), "a frame of 0×8 pixels is empty"),
        (lambda folder: read_picture(np.full((8, 8, 3), 1.5), 8, 8), r"float64 must have numbers in \[0, 1\], not 1.5"),
        (lambda folder: read_picture(np.full((8, 8, 3), np.nan), 8, 8), r"must have numbers in \[0, 1\], not nan"),
        (lambda folder: list(read_video([np.full((8, 8, 3), -0.1)], 8, 8, 16)), r"must have numbers .* not -0.1"),
        (lambda folder: read_picture(Image.open(folder / "cut.png"), 8, 8), "cannot read a PIL image: "),
        (lambda folder: read_picture(Image.new("RGB", (210, 10)), 8, 8), "210×10 pixels; expected sides of at most 20"),
        (lambda folder: list(read_video(folder / "none.mp4", 8, 8, 16)), "none.mp4: No such file"),
        (lambda folder: list(read_video(folder / "text.png", 8, 8, 16)), r"cannot read .*text.png"),
        (lambda folder: list(read_video(folder, 8, 8, 16)), "cannot read"),
        (lambda folder: list(read_video(folder / "text.webp", 8, 8, 16)), r"cannot read .*text.webp"),
        (lambda folder: list(read_video(NOT_FRAMES, 8, 8, 16)), "a frame must be a PIL image, .* not list"),
        (
            lambda folder: read_picture(torch.zeros(8, 8, 3), 8, 8),
            r"\(3, height, width\).* float32 \(8, 8, 3\)",
        ),
        (lambda folder: read_picture(torch.zeros(3, 8, 8, dtype=torch.uint8), 8, 8), "a tensor must be float .* uint8"),
        (lambda folder: read_picture(torch.zeros(3, 8, 8) - 1, 8, 8), r"must have numbers in \[0, 1\], not -1 to -1"),
        (lambda folder: read_picture(torch.full((3, 8, 8), torch.nan), 8, 8), r"numbers in \[0, 1\], not nan"),
        (lambda folder: read_picture(torch.zeros(3, 8, 8, device="meta"), 8, 8), "cannot read a tensor: "),
        (lambda folder: read_picture(torch.zeros(3, 8, 8).to_sparse(), 8, 8), "cannot read a tensor: "),
        (lambda folder: read_picture(torch.zeros(3, 10**6, 10**6, device="meta"), 8, 8), "1000000×1000000 pixels"),
        (
            lambda folder: list(read_video(torch.zeros(1, 2, 3, 8, 8), 8, 8, 16)),
            "4 axes, frames first, not 5",
        ),
        (lambda folder: list(read_video(np.zeros(()), 8, 8, 16)), "4 axes, frames first, not 0"),
    ],
)
def test_what_cannot_be_read_is_one_line(tmp_path: Path, read: Callable[[Path], object], says: str) -> None:
    for name in ("text.png", "text.webp"):
        (tmp_path / name).write_text("no picture at all")
    Image.fromarray(picture(64, 64)).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:2000])
    with pytest.raises(InputError, match=says) as caught:
        read(tmp_path)
    assert "\n" not in str(caught.value)


def test_pictures_of_absurd_sizes_are_refused_by_their_header(tmp_path: Path) -> None:
    """Hundreds of bytes that would take gigabytes and half a minute to decode and scale."""
    Image.new("RGB", (60000, 1)).save(tmp_path / "line.png")
    Image.new("1", (9000, 9000)).save(tmp_path / "large.png")
    for name, said in (("line", "60000×1 pixels; expected sides of at most 20 to 1"), ("large", "at most 34 million")):
        with pytest.raises(InputError, match=rf"cannot read .*{name}\.png: it has .*{said}"):
            read_picture(tmp_path / f"{name}.png", 64, 64)
    with pytest.raises(InputError, match="60000×1 pixels"):
        read_picture(np.zeros((1, 60000, 3), np.uint8), 64, 64)


def test_a_picture_with_a_broken_chunk_is_one_sentence(tmp_path: Path) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    data = bytearray((tmp_path / "a.png").read_bytes())
    for at in range(8, len(data), 7):
        broken = bytearray(data)
        broken[at] ^= 0xFF
        (tmp_path / "b.png").write_bytes(broken)
        said = ""
        try:
            assert read_picture(tmp_path / "b.png", 32, 32).shape == (32, 32, 3)
        except InputError as error:
            said = str(error)
        assert "\n" not in said


def test_large_pictures_are_reduced_before_they_are_scaled(tmp_path: Path) -> None:
    gradient = np.linspace(0, 255, 2000).astype(np.uint8)
    picture = np.broadcast_to(gradient[:, None, None], (2000, 2000, 3))
    Image.fromarray(np.ascontiguousarray(picture)).save(tmp_path / "large.png")
    reduced = read_picture(tmp_path / "large.png", 64, 64)
    assert abs(reduced.astype(int) - fit(np.ascontiguousarray(picture), 64, 64)).max() <= 2


def test_a_gap_in_a_videos_timestamps_is_refused(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "gap.mkv"), "w") as container:
        stream = container.add_stream("libx264", rate=16)
        stream.height, stream.width, stream.pix_fmt = 64, 64, "yuv420p"
        for pts in (0, 10**7):
            frame = av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), format="rgb24")
            frame.pts = pts
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with pytest.raises(InputError, match="a frame of the video is shown for more than 60 s"):
        list(read_video(tmp_path / "gap.mkv", 64, 64, 16))
