"""What frames are written into: a media file, a pipe, or a folder of pictures."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol

import numpy as np

if TYPE_CHECKING:
    import av

_BT709 = 1  # the number of BT.709 as matrix, primaries and transfer alike (ITU-T H.273)


@dataclass(frozen=True)
class Format:
    """How a kind of file is written: its container, codec and pixel format, the options of codec and container, and the
    longest side in pixels.

    While frames come, MP4 and MOV are fragments of one frame each, so that what is on disk can be played at any moment;
    `final_options` lay the finished file out as an ordinary one, its index first.
    """

    container: str
    codec: str
    pixels: str
    codec_options: dict[str, str] = field(default_factory=dict)
    container_options: dict[str, str] = field(default_factory=dict)
    longest_side: int = 16384
    final_options: dict[str, str] | None = None  # of the container, where the finished file is laid out anew

    @property
    def even(self) -> bool:
        """Whether sides must be even, since two pixels share one colour."""
        return self.pixels == "yuv420p"


# crf 14: flat colours come back within a few steps of 255. No frame waits for later ones (no B-frames, no look-ahead),
# and packets go to the disk as they come: a killed process loses two frames, and a full disk is noticed at once.
_H264 = {"crf": "14", "preset": "fast", "bf": "0", "x264-params": "rc-lookahead=0:sync-lookahead=0:mbtree=0"}
_FRAGMENTS = {"movflags": "+frag_every_frame+empty_moov+default_base_moof", "flush_packets": "1"}
_INDEX_FIRST = {"movflags": "+faststart"}
FORMATS = {
    ".mp4": Format("mp4", "libx264", "yuv420p", _H264, _FRAGMENTS, final_options=_INDEX_FIRST),
    ".mov": Format("mov", "libx264", "yuv420p", _H264, _FRAGMENTS, final_options=_INDEX_FIRST),
    ".webm": Format(
        "webm",
        "libvpx-vp9",
        "yuv420p",
        {"crf": "15", "b": "0", "deadline": "realtime", "cpu-used": "5", "row-mt": "1", "lag-in-frames": "0"},
        {"flush_packets": "1", "cluster_time_limit": "1"},
    ),
    ".gif": Format("gif", "gif", "pal8", {}, {"loop": "0", "flush_packets": "1"}, 65535),
    ".webp": Format("webp", "libwebp_anim", "bgra", {"quality": "90"}, {"loop": "0"}, 16383),
}
STREAM = FORMATS[".mp4"]  # what a pipe takes: fragments as they come


class Sink(Protocol):
    """Takes frames one by one."""

    def add(self, frame: np.ndarray) -> None:
        """Writes one uint8 frame, (H, W, 3)."""
        ...

    def finish(self) -> None:
        """Writes what is still held back, and closes."""
        ...


class PngFolder:
    """000000.png, 000001.png, ... in a folder that is there."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._count = folder, 0

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


class AvFile:
    """One container with one video stream, in a file or in a binary stream; its first frame has the number `first`."""

    def __init__(
        self, target: Path | BinaryIO, kind: Format, height: int, width: int, fps: float, first: int = 0
    ) -> None:
        import av

        self._rate, self._count = Fraction(fps).limit_denominator(1001), first
        where = str(target) if isinstance(target, Path) else target
        self._container = av.open(where, "w", format=kind.container, options=dict(kind.container_options))
        stream = self._container.add_stream(kind.codec, rate=self._rate, options=dict(kind.codec_options))
        assert isinstance(stream, av.VideoStream)
        self._stream = stream
        stream.height, stream.width, stream.pix_fmt = height, width, kind.pixels
        if kind.pixels == "yuv420p":
            context = stream.codec_context
            context.colorspace = context.color_primaries = context.color_trc = _BT709
            context.color_range = av.video.reformatter.ColorRange.MPEG
        self._format = kind.pixels
        self._reformatter = av.video.reformatter.VideoReformatter()  # making one takes 0.1 ms
        self._palette = _palette_graph(height, width, self._rate) if kind.codec == "gif" else None
        self._container.start_encoding()  # now, not at the first frame: what cannot be written is said early

    def add(self, frame: np.ndarray) -> None:
        import av

        picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
        picture.pts, picture.time_base = self._count, 1 / self._rate
        self._count += 1
        if self._palette is None:
            self._encode(self._converted(picture))
        else:
            self._palette.push(picture)
            self._encode_palette_frames()

    def finish(self) -> None:
        if self._palette is not None:
            self._palette.push(None)
            self._encode_palette_frames()
        self._encode(None)
        self._container.close()

    def _converted(self, picture: av.VideoFrame) -> av.VideoFrame:
        from av.video.reformatter import ColorRange, Colorspace

        colors: dict[str, Any] = {}
        if self._format == "yuv420p":
            colors = {"dst_colorspace": Colorspace.ITU709, "dst_color_range": ColorRange.MPEG}
        return self._reformatter.reformat(picture, format=self._format, threads=1, **colors)

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


def lay_out(source: Path, target: Path, kind: Format) -> None:
    """Copies the packets of a finished file into an ordinary one of the same kind; nothing is encoded again."""
    import av

    options = dict(kind.final_options or {})
    with av.open(str(source)) as given, av.open(str(target), "w", format=kind.container, options=options) as made:
        stream = made.add_stream_from_template(given.streams.video[0])
        for packet in given.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                made.mux(packet)


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
