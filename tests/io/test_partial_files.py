"""One writer a path: a second one is refused while the first one lives, and a finished file is replaced at the end."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from causalrope_sp.errors import OutputError
from causalrope_sp.io.video_writer import VideoWriter, check_alone, check_output
from tests.io.test_video import FPS, HEIGHT, NAMES, WIDTH, decoded, scene, write, writer_of


@pytest.mark.parametrize("name", NAMES)
def test_two_writers_of_one_path_do_not_mix(tmp_path: Path, name: str) -> None:
    """A finished file of the name stays until the new one is finished."""
    path = f"{tmp_path}/{name}"
    if name != "a/":
        write(tmp_path, name, scene()[:2])
    with VideoWriter(path, HEIGHT, WIDTH, FPS) as first:
        first.write(scene()[:5])
        for ask in (lambda: VideoWriter(path, HEIGHT, WIDTH, FPS), lambda: check_alone(path)):
            with pytest.raises(OutputError, match=r"^cannot write .*: another run is writing it, in .*\.partial[^:]*$"):
                ask()
        assert name == "a/" or len(decoded(tmp_path / name)) == 2
        first.write(scene()[5:])
    assert os.listdir(tmp_path) == [name.rstrip("/")]
    assert len(decoded(tmp_path / name.rstrip("/"))) == len(scene())
    check_alone(path)


def test_another_process_that_writes_is_seen_until_it_is_killed(tmp_path: Path) -> None:
    code = (
        "import sys; from causalrope_sp.io.video_writer import VideoWriter\n"
        f"writer = VideoWriter('{tmp_path}/a.gif', 64, 96, 16.0); print('open', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"open\n"
        with pytest.raises(OutputError, match="another run is writing it"):
            writer_of(tmp_path)
        other.kill()
    write(tmp_path, "a.gif", scene())
    assert sorted(os.listdir(tmp_path)) == ["a.gif", "a.partial.gif"]


def test_a_partial_files_name_that_is_too_long_is_found_at_the_start(tmp_path: Path) -> None:
    check_output(tmp_path / ("x" * 243 + ".mp4"))
    with pytest.raises(OutputError, match="File name too long"):
        check_output(tmp_path / ("x" * 251 + ".mp4"))
