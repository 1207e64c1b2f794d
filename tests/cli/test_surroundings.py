"""Streams, folders, environments and memory that a command cannot run in end in one sentence, never in a traceback."""

from __future__ import annotations

import io
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from causalrope_sp.distributed import SequenceParallel
from causalrope_sp.errors import ConfigError, OutputError, is_out_of_memory
from causalrope_sp.io.video_writer import VideoWriter
from tests.support.paths import ROOT
from tests.support.shell import PROMPT, frames_in, shell

GENERATE = ("generate", PROMPT, "--frames", "9", "--out", "v.mp4")
COMMANDS = (
    ("--help",),
    ("generate", "--help"),
    ("inspect", "toybox", "--json"),
    ("plan", "--model", "toybox"),
    ("verify", "--ranks", "1", "--strategy", "ulysses"),
    ("encode", PROMPT),
    ("profile-reuse", PROMPT, "--frames", "9"),
    GENERATE,
    (*GENERATE, "--json"),
)


def process(folder: Path, words: tuple[str, ...], limit: Callable[[], None] | None = None, **streams: Any) -> Any:
    """Runs a command in a folder, without a launcher's variables but those in `streams["set"]`."""
    environment = {name: text for name, text in os.environ.items() if name not in ("WORLD_SIZE", "RANK", "LOCAL_RANK")}
    environment |= {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]), **streams.pop("set", {})}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **streams}
    line = [sys.executable, "-m", "causalrope_sp", *words]
    return subprocess.run(line, cwd=folder, env=environment, text=True, timeout=120, preexec_fn=limit, **streams)


def one_sentence(done: Any, status: int, *words: str) -> None:
    assert done.returncode == status, done.stderr
    assert done.stderr.startswith("error"), done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert all(word in done.stderr for word in words), done.stderr


@pytest.mark.parametrize("words", COMMANDS)
def test_a_full_standard_output_is_one_sentence(words: tuple[str, ...], tmp_path: Path) -> None:
    with open("/dev/full", "w") as full:
        done = process(tmp_path, words, stdout=full)
    one_sentence(done, 2, "cannot write to the standard output: No space left on device")
    assert words[-1] == "--help" or words[0] != "generate" or frames_in(tmp_path / "v.mp4") == 9


@pytest.mark.parametrize("words", [COMMANDS[1], COMMANDS[2], GENERATE])
def test_a_closed_standard_output_is_one_sentence(words: tuple[str, ...], tmp_path: Path) -> None:
    done = process(tmp_path, words, limit=lambda: os.close(1), stdout=None)
    one_sentence(done, 2, "cannot write to the standard output: it is closed")
    assert words != GENERATE or frames_in(tmp_path / "v.mp4") == 9


@pytest.mark.parametrize("words", [COMMANDS[1], COMMANDS[2], COMMANDS[3], GENERATE])
def test_a_reader_that_has_left_is_no_error(words: tuple[str, ...], tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = process(tmp_path, words, stdout=writing)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")
    assert words != GENERATE or frames_in(tmp_path / "v.mp4") == 9


def test_a_reader_of_the_video_that_leaves_ends_the_run(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = process(tmp_path, ("generate", PROMPT, "--frames", "9", "--out", "-"), stdout=writing)
    os.close(writing)
    one_sentence(done, 2, "cannot write -: Broken pipe")


def test_an_error_that_cannot_be_said_keeps_its_status(tmp_path: Path) -> None:
    with open("/dev/full", "w") as full:
        assert process(tmp_path, ("generate", PROMPT, "--frames", "0"), stderr=full).returncode == 2
    assert process(tmp_path, GENERATE, limit=lambda: os.close(2), stderr=None).returncode == 0


def test_names_of_files_that_are_not_text_are_printed(tmp_path: Path) -> None:
    done = process(tmp_path, ("encode", PROMPT, "--out", "\udcff.safetensors"), set={"PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stderr) == (0, "")
    assert "\\udcff.safetensors: 2 tokens" in done.stdout


def test_a_log_file_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "v.mp4").touch()  # that it is replaced is logged
    done = process(tmp_path, (*GENERATE, "--json", "--log-file", "/dev/full"))
    assert (done.returncode, done.stderr) == (0, "cannot write /dev/full: No space left on device\n")
    assert frames_in(tmp_path / "v.mp4") == 9


def test_what_a_terminal_would_obey_is_escaped(tmp_path: Path) -> None:
    """In the name of a file, which click strips only where the output is no terminal."""
    done = process(tmp_path, ("encode", PROMPT, "--out", "\x9b31m\u202e.safetensors"))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("\\x9b31m\\u202e.safetensors: 2 tokens")


@pytest.mark.parametrize("words", [COMMANDS[2], GENERATE])
def test_a_working_directory_that_is_gone(words: tuple[str, ...], tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    done = process(gone, words, limit=lambda: os.rmdir(gone))
    one_sentence(done, 2, "the working directory does not exist any more")


@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        ("RANK=x", "RANK in the environment must be a whole number of at least 0 and at most 65536, not 'x'"),
        ("WORLD_SIZE=", "WORLD_SIZE in the environment must be a whole number of at least 1"),
        ("WORLD_SIZE=1_0", "not '1_0'"),
        ("WORLD_SIZE=10000000000 RANK=0", "not '10000000000'"),
        ("WORLD_SIZE=2 RANK=2", "RANK in the environment must be below WORLD_SIZE, which is 2, not 2"),
        ("LOCAL_RANK=-5", "LOCAL_RANK in the environment must be"),
        ("LOCAL_WORLD_SIZE=\x1b[31m", "not '\\x1b[31m'"),
        ("GROUP_RANK=x", "GROUP_RANK"),
        ("WORLD_SIZE=2", "2 ranks, but RANK is missing"),
        ("WORLD_SIZE=2 RANK=0 MASTER_PORT=29511", "2 ranks, but MASTER_ADDR is missing"),
        ("WORLD_SIZE=2 RANK=0 MASTER_ADDR=localhost MASTER_PORT=http", "MASTER_PORT in the environment must be"),
        ("WORLD_SIZE=2 RANK=0 MASTER_ADDR=localhost MASTER_PORT=99999", "at most 65535, not '99999'"),
    ],
)
def test_nonsense_in_a_launchers_variables(
    variables: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For the library in this process and, where it is not the same check, for a command in its own."""
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    given = dict(variable.split("=", 1) for variable in variables.split())
    for name, text in given.items():
        monkeypatch.setenv(name, text)
    with pytest.raises(ConfigError) as caught:
        SequenceParallel.from_env()
    assert reason in str(caught.value)
    if variables.startswith("RANK") or "MASTER_PORT=http" in variables:
        one_sentence(process(tmp_path, GENERATE, set=given), 2, reason)


@pytest.mark.parametrize(("allowed", "status"), [(400 << 20, 2), (640 << 20, 1)])
def test_too_little_memory_is_one_sentence(allowed: int, status: int, tmp_path: Path) -> None:
    done = process(tmp_path, GENERATE, limit=lambda: resource.setrlimit(resource.RLIMIT_AS, (allowed, allowed)))
    one_sentence(done, status, "ulimit -v", "MB" if status == 2 else "out of memory")
    assert os.listdir(tmp_path) == []


def test_an_error_that_a_library_makes_of_ctrl_c_is_ctrl_c(monkeypatch: pytest.MonkeyPatch) -> None:
    """safetensors calls Python from Rust, and says that a shape is missing if that is interrupted."""

    def interrupted(*_: object) -> None:
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise ValueError("could not determine the shape") from None

    monkeypatch.setattr("causalrope_sp.cli.inspect.examine", interrupted)
    result = shell("inspect", "toybox")
    assert (result.exit_code, result.output) == (130, "")


def test_what_libraries_say_when_memory_ends() -> None:
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory"))
    assert is_out_of_memory(RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB"))
    led_to = RuntimeError("Failed to import diffusers")
    led_to.__cause__ = MemoryError()
    assert is_out_of_memory(led_to)
    assert not is_out_of_memory(RuntimeError("sizes differ"))


def test_the_library_has_a_sentence_for_a_standard_output_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    for stream in (None, io.StringIO()):  # as in a notebook
        monkeypatch.setattr(sys, "stdout", stream)
        with pytest.raises(OutputError, match="cannot write to the standard output: it is closed, or takes text alone"):
            VideoWriter("-", 16, 16, 8.0)
