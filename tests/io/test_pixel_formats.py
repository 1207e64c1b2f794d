"""Every mode of Pillow and every pixel format of PyAV is converted rightly, or refused by its name."""

from __future__ import annotations

import contextlib
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from av.video import format as pixel_formats
from PIL import Image

from causalrope_sp.errors import InputError
from causalrope_sp.io.media_reader import read_picture, read_video
from causalrope_sp.io.pixel_formats import frame_on_black

RAMP = np.arange(256, dtype=np.uint16)[None].repeat(16, 0)
COLOURS = np.zeros((32, 32, 3), np.uint8)
COLOURS[..., 0] = np.arange(32) * 8
COLOURS[..., 1] = np.arange(32)[:, None] * 8
COLOURS[..., 2] = 120


def grey(pixels: np.ndarray) -> np.ndarray:
    assert (pixels[..., 0] == pixels[..., 1]).all()
    assert (pixels[..., 0] == pixels[..., 2]).all()
    return pixels[..., 0]


@pytest.mark.parametrize("name", ["g.png", "g.tiff", "g.pgm"])
def test_grey_of_16_bits_is_the_same_grey_in_8(tmp_path: Path, name: str) -> None:
    """White is 65535. A ramp has mean 127.5; cut off at 255 it had 254."""
    Image.fromarray(RAMP * 257).save(tmp_path / name)
    assert (grey(read_picture(tmp_path / name, 16, 256)) == RAMP).all()
    between = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    Image.fromarray(between).save(tmp_path / name)
    wanted = np.rint(between / 257)
    assert (grey(read_picture(tmp_path / name, 256, 256)) == wanted).all()
    assert (grey(read_picture(Image.open(tmp_path / name), 256, 256)) == wanted).all()


@pytest.mark.parametrize("order", ["<u2", ">u2"])
def test_both_orders_of_bytes(tmp_path: Path, order: str) -> None:
    made = Image.fromarray((RAMP * 257).astype(order))
    assert made.mode in ("I;16", "I;16B")
    assert (grey(read_picture(made, 16, 256)) == RAMP).all()
    made.save(tmp_path / "g.tiff")
    assert (grey(read_picture(tmp_path / "g.tiff", 16, 256)) == RAMP).all()


def test_a_large_picture_of_16_bits_is_reduced(tmp_path: Path) -> None:
    Image.fromarray(np.full((160, 160), 30000, np.uint16)).save(tmp_path / "g.png")
    assert (read_picture(tmp_path / "g.png", 16, 16) == round(30000 / 257)).all()


@pytest.mark.parametrize(
    ("made", "mode"),
    [(RAMP.astype(np.int32), "I"), (RAMP.astype(np.float32), "F"), (RAMP.astype(np.float32) / 255, "F")],
)
def test_numbers_without_a_white_are_refused(tmp_path: Path, made: np.ndarray, mode: str) -> None:
    Image.fromarray(made).save(tmp_path / "g.tiff")
    for source in (tmp_path / "g.tiff", Image.fromarray(made)):
        with pytest.raises(
            InputError, match=rf"cannot read .*\(mode {mode}\), of which no number is known to be white"
        ):
            read_picture(source, 16, 16)


MODES = ("1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "LA", "PA", "RGBX", "RGBa", "La")


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_of_pillow(mode: str) -> None:
    """Against Pillow's own conversion to RGB; half of what has alpha is half transparent, on black."""
    opaque = Image.fromarray(COLOURS)
    alpha = Image.new("L", opaque.size, 128)
    if mode in ("LA", "La", "PA", "RGBA", "RGBa"):
        base = {"LA": "L", "La": "L", "PA": "P", "RGBA": "RGB", "RGBa": "RGB"}[mode]
        plain = opaque.convert(base)
        bands = {"PA": "PA"}.get(mode, base + "A")
        made: Any = plain.convert(bands)
        made.putalpha(alpha)
        made = made.convert(mode) if mode in ("RGBa", "La") else made
        wanted = np.asarray(plain.convert("RGB")) * (128 / 255)
    elif mode == "LAB":
        from PIL import ImageCms

        srgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        made = ImageCms.profileToProfile(opaque, srgb, lab, outputMode="LAB")
        wanted = np.asarray(made.convert("RGB"))
    else:
        made = opaque.convert(mode)
        wanted = np.asarray(made.convert("RGB"))
    assert made.mode == mode
    off = np.abs(read_picture(made, 32, 32) - np.asarray(wanted, dtype=np.float64))
    assert off.max() <= 1


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "I;16"])
def test_a_transparent_colour_is_black(tmp_path: Path, mode: str) -> None:
    """PNG's tRNS of a picture without an alpha channel."""
    if mode == "I;16":
        made, key = Image.fromarray(np.array([[40000] * 4 + [20000] * 4] * 4, np.uint16)), 40000
        shown = round(20000 / 257)
    else:
        made = Image.new("RGB", (8, 4), (255, 255, 255)).convert(mode)
        key = {"RGB": (255, 255, 255), "P": made.getpixel((0, 0))}.get(mode, 255)  # type: ignore[assignment]
        made.paste(Image.new("RGB", (4, 4), (0, 0, 0)).convert(mode), (4, 0))
        shown = 0
    made.save(tmp_path / "t.png", transparency=1 if mode == "1" else key)
    pixels = read_picture(tmp_path / "t.png", 4, 8)
    assert (pixels[:, :4] == 0).all()
    assert (pixels[:, 4:] == shown).all()


def test_an_animated_picture_with_alpha_lies_on_black(tmp_path: Path) -> None:
    frames = [Image.new("RGBA", (16, 16), (200, 100, 50, 0 if n else 255)) for n in range(2)]
    frames[0].save(tmp_path / "a.webp", save_all=True, append_images=frames[1:], duration=100, lossless=True)
    first, second = read_video(tmp_path / "a.webp", 16, 16, 10)
    assert (first == (200, 100, 50)).all()
    assert (second == 0).all()


def written_by_the_scaler() -> list[av.VideoFrame]:
    """The colours in every format that FFmpeg's scaler writes."""
    source, written = av.VideoFrame.from_ndarray(COLOURS, "rgb24"), []
    for name in sorted(vars(pixel_formats)["names"]):
        with contextlib.suppress(OSError, ValueError):
            written.append(source.reformat(format=name))
    return written


def test_every_pixel_format_that_the_scaler_writes_comes_back_or_is_refused() -> None:
    """Within the rounding of chroma and of few bits."""
    written, refused = written_by_the_scaler(), []
    assert len(written) > 150
    for frame in written:
        name = frame.format.name
        try:
            pixels = frame_on_black(frame, None)
        except InputError as error:
            assert name in str(error)  # noqa: PT017
            refused.append(name)
            continue
        bits, grey_only = frame.format.components[0].bits, len([c for c in frame.format.components if not c.is_alpha])
        wanted: Any = COLOURS.astype(float)
        if grey_only == 1 and not frame.format.has_palette and name not in ("bgr8", "rgb8"):
            wanted = (wanted @ (0.299, 0.587, 0.114))[..., None]
        if bits == 1 and name.startswith("mono"):  # dithered
            pixels, wanted = pixels.mean((0, 1)), wanted.mean((0, 1))
        off = np.abs(pixels - wanted).mean()
        assert off < (24 if bits < 4 else 6), (name, off)
    kinds = {"bgr444be", "bgr555be", "bgr565be", "rgb444be", "rgb555be", "rgb565be", "bgr4", "rgb4", "bgr4_byte"}
    assert kinds <= {*refused}
    assert all("f32" in name or "f16" in name or name in {*kinds, "rgb4_byte"} for name in refused), refused


@pytest.mark.parametrize("name", ["bayer_rggb8", "grayf16le", "rgbf32le", "yaf32be", "gbrapf32le", "gbrap32le"])
def test_formats_that_are_no_pixels_of_a_screen_are_refused_by_name(name: str) -> None:
    with pytest.raises(InputError, match=f"its pixel format {name} is not converted; expected integers of 8 to 16"):
        frame_on_black(av.VideoFrame(32, 32, name), None)


def rgb(y: int, u: int, v: int, full: bool, kr: float, kb: float) -> np.ndarray:
    """ITU-R BT.601, 709 and 2020: RGB of 8 bits from Y'CbCr of 8 bits, in float64."""
    luma, blue, red = (
        (y / 255, (u - 128) / 255, (v - 128) / 255)
        if full
        else (
            (y - 16) / 219,
            (u - 128) / 224,
            (v - 128) / 224,
        )
    )
    r, b = luma + 2 * (1 - kr) * red, luma + 2 * (1 - kb) * blue
    return 255 * np.array([r, (luma - kr * r - kb * b) / (1 - kr - kb), b])


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize(
    ("space", "kr", "kb"), [(2, 0.299, 0.114), (5, 0.299, 0.114), (1, 0.2126, 0.0722), (9, 0.2627, 0.0593)]
)
@pytest.mark.parametrize(
    ("codec", "pixel_format", "bits"),
    [("libx264", "yuv420p", 8), ("libx264", "yuv420p10le", 10), ("ffv1", "yuv420p12le", 12), ("ffv1", "yuv422p", 8)],
)
def test_range_matrix_and_depth(
    tmp_path: Path, codec: str, pixel_format: str, bits: int, space: int, kr: float, kb: float, full: bool
) -> None:
    """Limited and full range; unsaid (2), BT.601, BT.709 and BT.2020; 8, 10 and 12 bits."""
    values, file = (180, 100, 150), tmp_path / ("v.mp4" if codec == "libx264" else "v.mkv")
    with av.open(file, "w") as container:
        stream: Any = container.add_stream(codec, rate=8)
        stream.width, stream.height, stream.pix_fmt = 64, 64, pixel_format
        stream.options = {"qp": "0"} if codec == "libx264" else {}
        stream.codec_context.color_range = 2 if full else 1
        stream.codec_context.colorspace = space
        for _ in range(3):
            frame = av.VideoFrame(64, 64, pixel_format)
            for plane, value in zip(frame.planes, values, strict=True):
                kind = np.uint8 if bits == 8 else np.uint16
                plane.update(np.full(plane.buffer_size // kind().itemsize, value << (bits - 8), kind).tobytes())
            frame.color_range, frame.colorspace = (2 if full else 1), space
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    pixels = next(read_video(file, 64, 64, 8))
    assert np.abs(pixels[32, 32] - rgb(*values, full, kr, kb)).max() <= 2.5


@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
@pytest.mark.parametrize("mirrored", [(False, False), (True, False), (False, True)])
def test_rotation_and_mirroring(tmp_path: Path, degrees: int, mirrored: tuple[bool, bool]) -> None:
    """All eight orientations: rotated counter-clockwise, then mirrored, as PyAV writes the display matrix."""
    corners = np.zeros((32, 64, 3), np.uint8)
    corners[:16, :32], corners[:16, 32:], corners[16:, :32] = (240, 0, 0), (0, 240, 0), (0, 0, 240)
    file = tmp_path / "v.mp4"
    with av.open(file, "w") as container:
        stream: Any = container.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt, stream.options = 64, 32, "yuv444p", {"qp": "0"}
        stream.set_display_rotation(degrees, hflip=mirrored[0], vflip=mirrored[1])
        for _ in range(2):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(corners, "rgb24")))
        container.mux(stream.encode())
    wanted = np.rot90(corners, degrees // 90)
    wanted = wanted[:: -1 if mirrored[1] else 1, :: -1 if mirrored[0] else 1]
    pixels = next(read_video(file, *wanted.shape[:2], 8))
    assert np.abs(pixels.astype(int) - wanted).max() <= 6


def write(file: Path, **settings: Any) -> Path:
    rotation = settings.pop("rotation", 0)
    with av.open(file, "w") as container:
        stream: Any = container.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt, stream.options = 64, 64, "yuv444p", {"qp": "0"}
        for name, value in settings.items():
            setattr(stream.codec_context, name, value)
        if rotation:
            stream.set_display_rotation(rotation)
        pixels = np.zeros((64, 64, 3), np.uint8)
        pixels[:, 16:48] = 250  # a square of half the height once a pixel is twice as wide as high
        pixels[:16], pixels[48:] = 0, 0
        frame = av.VideoFrame.from_ndarray(pixels, "rgb24")
        if "color_trc" in settings:
            frame.color_trc = settings["color_trc"]
        for _ in range(2):
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file


def test_pixels_that_are_not_square_are_made_square(tmp_path: Path) -> None:
    file = write(tmp_path / "v.mp4", sample_aspect_ratio=Fraction(2, 1))
    bright = next(read_video(file, 64, 128, 8))[..., 1] > 128
    assert (bright.any(0).sum(), bright.any(1).sum()) == (64, 32)


def test_pq_video_and_other_rotations_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot read .*: it is HDR \(PQ, SMPTE ST 2084\), which needs tone mapping"):
        next(read_video(write(tmp_path / "v.mp4", color_trc=16), 64, 64, 8))
    with pytest.raises(InputError, match=r"cannot read .*: it is shown rotated by 45° or scaled; expected a multiple"):
        next(read_video(write(tmp_path / "w.mp4", rotation=45), 64, 64, 8))


def test_a_video_with_alpha_lies_on_black(tmp_path: Path) -> None:
    pixels = np.full((32, 32, 4), (200, 100, 50, 255), np.uint8)
    pixels[:, 16:, 3] = 0
    with av.open(tmp_path / "v.mkv", "w") as container:
        stream: Any = container.add_stream("ffv1", rate=8)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "bgra"
        for _ in range(2):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, "rgba")))
        container.mux(stream.encode())
    read = next(read_video(tmp_path / "v.mkv", 32, 32, 8))
    assert np.abs(read[:, :16].astype(int) - (200, 100, 50)).max() <= 2
    assert (read[:, 16:] == 0).all()
