from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image, ImageSequence

from causalrope_sp.errors import ConfigError, OutputError
from causalrope_sp.io.video_writer import VideoWriter, check_output

HEIGHT, WIDTH, FPS = 64, 96, 16.0
COLORS = [(220, 40, 40), (40, 180, 60), (50, 90, 220), (230, 210, 50), (150, 60, 200), (240, 140, 30)]
NAMES = ["a.mp4", "a.mov", "a.webm", "a.gif", "a.webp", "a/"]


def scene(frames: int = 8) -> np.ndarray:
    """Six flat colours as 32-pixel tiles that change places with time."""
    video = np.empty((frames, HEIGHT, WIDTH, 3), np.uint8)
    for t in range(frames):
        for tile in range(6):
            y, x = divmod(tile, 3)
            video[t, 32 * y : 32 * y + 32, 32 * x : 32 * x + 32] = COLORS[(tile + t) % 6]
    return video


def decoded(path: Path) -> np.ndarray:
    if path.suffix in (".mp4", ".mov", ".webm"):
        with av.open(str(path)) as container:
            return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    if path.is_dir():
        return np.stack([np.asarray(Image.open(name)) for name in sorted(path.glob("*.png"))])
    with Image.open(path) as image:
        return np.stack([np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(image)])


def write(folder: Path, name: str, video: np.ndarray) -> Path:
    with VideoWriter(f"{folder}/{name}", HEIGHT, WIDTH, FPS) as writer:
        writer.write(video[:3])
        writer.write(video[3:3])
        writer.write(video[3:])
    assert writer.frames == len(video)
    return folder / name.rstrip("/")


def stopped_by(error: BaseException, path: str | Path, video: np.ndarray) -> None:
    before = os.listdir(Path(path).parent)
    with VideoWriter(path, HEIGHT, WIDTH, FPS) as writer:
        writer.write(video)
        assert all(".partial" in entry for entry in os.listdir(Path(path).parent) if entry not in before)
        raise error


def played(path: Path) -> int:
    """How many frames a player shows before it meets a packet that was cut off."""
    shown = 0
    with contextlib.suppress(av.FFmpegError), av.open(str(path)) as container:
        for _ in container.decode(video=0):
            shown += 1
    return shown


def partial_name(name: str) -> str:
    """Where the frames are before the file has its name."""
    stem, dot, suffix = name.rstrip("/").partition(".")
    return f"{stem}.partial{dot}{suffix}"


def writer_of(folder: Path) -> VideoWriter:
    return VideoWriter(folder / "a.gif", HEIGHT, WIDTH, FPS)


@pytest.mark.parametrize("name", NAMES)
def test_frames_and_colours_come_back(tmp_path: Path, name: str) -> None:
    video = scene()
    path = write(tmp_path, name, video)
    back = decoded(path)
    assert back.shape == video.shape
    inside = np.zeros((HEIGHT, WIDTH), bool)  # away from the tiles' edges, where halved chroma must blur
    for y in range(0, HEIGHT, 32):
        for x in range(0, WIDTH, 32):
            inside[y + 6 : y + 26, x + 6 : x + 26] = True
    worst = np.abs(back.astype(int) - video)[:, inside].max()
    assert worst <= {".mp4": 8, ".mov": 8, ".webm": 8, ".gif": 0, ".webp": 8, "": 0}[path.suffix]
    assert sorted(os.listdir(tmp_path)) == [path.name]


def test_mp4_says_how_its_colours_are_stored_and_keeps_time(tmp_path: Path) -> None:
    with av.open(str(write(tmp_path, "a.mp4", scene(16)))) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.pix_fmt) == ("h264", "yuv420p")
        assert stream.average_rate == 16
        frame = next(container.decode(stream))
        assert (frame.colorspace, frame.color_range) == (1, 1)  # BT.709, limited
        assert container.duration == 1_000_000


@pytest.mark.parametrize("name", ["a.gif", "a.webp"])
def test_animations_last_as_long_as_their_frames(tmp_path: Path, name: str) -> None:
    with Image.open(write(tmp_path, name, scene(16))) as image:
        milliseconds = sum(frame.info["duration"] for frame in ImageSequence.Iterator(image) if not frame.load() or 1)
        assert image.info["loop"] == 0
    assert abs(milliseconds - 1000) <= 20


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a/"])
def test_odd_sizes_outside_mp4(tmp_path: Path, name: str) -> None:
    video = np.stack([np.full((33, 31, 3), shade, np.uint8) for shade in (20, 200)])
    with VideoWriter(f"{tmp_path}/{name}", 33, 31, 24000 / 1001) as writer:
        writer.write(video)
    assert decoded(tmp_path / name.rstrip("/")).shape == video.shape


@pytest.mark.parametrize("name", NAMES)
def test_an_error_leaves_the_frames_in_a_partial_file(tmp_path: Path, name: str) -> None:
    with pytest.raises(RuntimeError):
        stopped_by(RuntimeError(), f"{tmp_path}/{name}", scene())
    assert os.listdir(tmp_path) == [partial_name(name)]
    assert len(decoded(tmp_path / partial_name(name))) == 8


@pytest.mark.parametrize("name", NAMES)
def test_a_later_run_keeps_and_names_the_partial_file(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(RuntimeError):
        stopped_by(RuntimeError(), f"{tmp_path}/{name}", scene()[:3])
    write(tmp_path, name, scene())
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert f"{partial_name(name)} is there from a run that ended early" in caplog.text
    assert sorted(os.listdir(tmp_path)) == sorted([name.rstrip("/"), partial_name(name)])
    assert len(decoded(tmp_path / partial_name(name))) == 3


@pytest.mark.parametrize("name", [name for name in NAMES if name != "a.webp"])
def test_a_killed_process_leaves_all_chunks_but_the_last(tmp_path: Path, name: str) -> None:
    """WebP alone is written at its end."""
    np.save(tmp_path / "video.npy", scene(40))
    code = (
        "import os, sys, numpy as np; from causalrope_sp.io.video_writer import VideoWriter\n"
        f"writer = VideoWriter('{tmp_path}/{name}', 64, 96, 16.0); video = np.load(sys.argv[1])\n"
        "for n in range(0, 36, 12): writer.write(video[n : n + 12])\n"
        "os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "video.npy")], timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert 24 <= len(decoded(tmp_path / partial_name(name))) <= 36


def test_a_finished_file_is_an_ordinary_one(tmp_path: Path) -> None:
    """Its index comes before the pictures, and it has no fragments."""
    for name in ("a.mp4", "a.mov"):
        data = write(tmp_path, name, scene(40)).read_bytes()
        assert data.index(b"moov") < data.index(b"mdat")
        assert b"moof" not in data


def test_a_name_that_is_taken_at_the_end_loses_nothing(tmp_path: Path) -> None:
    writer = VideoWriter(tmp_path / "a.mp4", HEIGHT, WIDTH, FPS)
    writer.write(scene())
    (tmp_path / "a.mp4").mkdir()
    with pytest.raises(OutputError, match=r"cannot write .*a\.mp4: .*; 8 frames are in .*a\.partial\.mp4"):
        writer.close()
    assert len(decoded(tmp_path / "a.partial.mp4")) == 8
    assert sorted(os.listdir(tmp_path)) == ["a.mp4", "a.partial.mp4"]


@pytest.mark.parametrize("name", NAMES)
def test_an_interrupt_keeps_the_frames_so_far(tmp_path: Path, name: str) -> None:
    with pytest.raises(KeyboardInterrupt):
        stopped_by(KeyboardInterrupt(), f"{tmp_path}/{name}", scene()[:5])
    assert len(decoded(tmp_path / name.rstrip("/"))) == 5
    assert len(os.listdir(tmp_path)) == 1


@pytest.mark.parametrize("name", NAMES)
def test_without_frames_there_is_no_file(tmp_path: Path, name: str) -> None:
    with pytest.raises(KeyboardInterrupt):
        stopped_by(KeyboardInterrupt(), f"{tmp_path}/{name}", scene()[:0])
    VideoWriter(f"{tmp_path}/{name}", HEIGHT, WIDTH, FPS).close()
    assert os.listdir(tmp_path) == []


def test_a_signal_waits_for_the_frame_that_is_being_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = VideoWriter(tmp_path / "a.mp4", HEIGHT, WIDTH, FPS)
    from_ndarray = av.VideoFrame.from_ndarray

    def signal_and_take(*args: Any, **options: Any) -> av.VideoFrame:
        os.kill(os.getpid(), signal.SIGINT)
        return from_ndarray(*args, **options)

    monkeypatch.setattr(av, "VideoFrame", SimpleNamespace(from_ndarray=signal_and_take))
    with pytest.raises(KeyboardInterrupt), writer:
        writer.write(scene())
    assert writer.frames == 1
    assert len(decoded(tmp_path / "a.mp4")) == 1


def test_an_old_file_is_replaced_only_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "a.gif"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError):
        stopped_by(RuntimeError(), path, scene())
    assert path.read_bytes() == b"old"
    write(tmp_path, "a.gif", scene())
    assert len(decoded(path)) == 8


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    write(tmp_path, "a", scene())
    assert sorted(os.listdir(tmp_path / "a"))[:2] == ["000000.png", "000001.png"]


@pytest.mark.parametrize(
    ("name", "height", "width", "reason"),
    [
        ("a.avi", 64, 64, r"must end in \.mp4, \.mov, \.webm, \.gif, \.webp, or in /"),
        ("a", 64, 64, "must end in"),
        ("", 64, 64, "full/: the folder is there and not empty"),
        ("full/a.mp4/", 64, 64, "a file of that name is in the way"),
        ("dir.mp4", 64, 64, "a folder of that name is in the way"),
        ("none/a.mp4", 64, 64, "there is no folder .*none"),
        ("x" * 300 + ".mp4", 64, 64, "too long"),
        ("a.mp4", 63, 64, "height 63 is odd"),
        ("a.mp4", 64, 63, "width 63 is odd"),
        ("a.webp", 64, 17000, "width 17000"),
    ],
)
def test_what_cannot_be_written_is_said_in_one_line(
    tmp_path: Path, name: str, height: int, width: int, reason: str
) -> None:
    (tmp_path / "dir.mp4").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a.mp4").write_bytes(b"")
    path = f"{tmp_path}/{name}" if name else f"{tmp_path}/full/"
    for attempt in (lambda: VideoWriter(path, height, width, FPS), lambda: check_output(path, height, width)):
        with pytest.raises(OutputError, match=reason) as caught:
            attempt()
        assert "\n" not in str(caught.value)
    assert sorted(os.listdir(tmp_path)) == ["dir.mp4", "full"]


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs a folder that even root cannot write")
def test_an_unwritable_folder_is_found_before_anything_is_made() -> None:
    with pytest.raises(OutputError, match=r"cannot write /proc/a\.mp4"):
        check_output("/proc/a.mp4")


def test_a_full_disk_is_one_line_and_keeps_what_fits(tmp_path: Path) -> None:
    script = f"""
import resource
import numpy as np
from causalrope_sp.errors import OutputError
from causalrope_sp.io.video_writer import VideoWriter
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
noise = np.random.default_rng(0).integers(0, 256, (40, 64, 64, 3), dtype=np.uint8)
for name in {[name for name in NAMES if name != "a/"]}:
    try:
        with VideoWriter("{tmp_path}/" + name, 64, 64, 16) as writer:
            writer.write(noise)
    except OutputError as error:
        print(writer.frames, error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    said = [line.split(" ", 1) for line in done.stdout.splitlines()]
    names = [name for name in NAMES if name != "a/"]
    assert len(said) == len(names), done.stderr
    for name, (frames, message) in zip(names, said, strict=True):
        assert message.startswith(f"cannot write {tmp_path}/{name}: File too large"), message
        if name == "a.webp":  # nothing of it is written before its end
            continue
        assert int(frames) >= 5, name
        assert message.endswith(f"; {frames} frames are in {tmp_path}/{partial_name(name)}")
        assert played(tmp_path / partial_name(name)) >= int(frames) - 3, name


@pytest.mark.parametrize(
    "frames",
    [
        np.zeros((1, HEIGHT, WIDTH, 3), np.float32),
        np.zeros((1, WIDTH, HEIGHT, 3), np.uint8),
        np.zeros((HEIGHT, WIDTH, 3), np.uint8),
    ],
)
def test_frames_of_another_kind_are_refused(tmp_path: Path, frames: np.ndarray) -> None:
    with pytest.raises(OutputError, match="takes uint8 frames of T×64×96×3"), writer_of(tmp_path) as writer:
        writer.write(frames)


@pytest.mark.parametrize("name", ["clip.mp4", "clip.gif", "clip/"])
def test_a_folder_that_is_removed_is_noticed_by_the_next_frames(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    writer = VideoWriter(f"{folder}/{name}", 16, 16, 8)
    writer.write(np.zeros((2, 16, 16, 3), np.uint8))
    shutil.rmtree(folder)
    with pytest.raises(OutputError, match=r"cannot write .*clip.*partial.* was removed while it was being written"):
        writer.write(np.zeros((2, 16, 16, 3), np.uint8))
    writer.abandon()
    assert not folder.exists()


def test_a_closed_writer_takes_nothing_more(tmp_path: Path) -> None:
    with writer_of(tmp_path) as writer:
        writer.write(scene())
    writer.close()
    writer.discard()
    with pytest.raises(OutputError, match="is closed"):
        writer.write(scene())
    assert os.listdir(tmp_path) == ["a.gif"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"fps": 0.0}, "fps must be a finite number above 0, not 0.0"),
        ({"fps": -1.0}, "fps must be a finite number above 0, not -1.0"),
        ({"fps": float("nan")}, "fps must be a finite number above 0, not nan"),
        ({"fps": "16"}, "fps must be a finite number above 0, not '16'"),
        ({"height": 64.0}, "height must be a whole number of at least 1, not 64.0"),
        ({"height": 0}, "height must be a whole number of at least 1, not 0"),
        ({"width": None}, "width must be a whole number of at least 1, not None"),
    ],
)
def test_a_wrong_argument_of_the_writer_is_one_sentence(tmp_path: Path, wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        VideoWriter(tmp_path / "a.mp4", **{"height": HEIGHT, "width": WIDTH, "fps": FPS} | wrong)
    assert not os.listdir(tmp_path)


def test_a_pipe_takes_fragments_as_they_come(tmp_path: Path) -> None:
    code = (
        "import sys, numpy as np; from causalrope_sp.io.video_writer import VideoWriter\n"
        "writer = VideoWriter('-', 64, 96, 16.0); video = np.load(sys.argv[1])\n"
        "writer.write(video[:5]); sys.stdout.buffer.flush(); assert sys.stdin.read(1) == 'g'\n"
        "writer.write(video[5:]); writer.close()"
    )
    np.save(tmp_path / "video.npy", scene())
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "video.npy")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        first = b""
        while first.count(b"moof") < 3:  # fragments, before the writer is told to go on
            first += os.read(process.stdout.fileno(), 1 << 20)
        (tmp_path / "first.mp4").write_bytes(first)
        process.stdin.write(b"g")
        process.stdin.close()
        (tmp_path / "all.mp4").write_bytes(first + process.stdout.read())
    assert process.returncode == 0
    assert len(decoded(tmp_path / "first.mp4")) >= 2  # playable before the video's end
    assert decoded(tmp_path / "all.mp4").shape == scene().shape
