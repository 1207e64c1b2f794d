"""Commands under torchrun: the same video, one voice, and how ranks end."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from causalrope_sp.distributed import strategies
from tests.support.paths import ROOT
from tests.support.shell import MODEL, PROMPT, StartEndless, frames_in, pictures, run, shell

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def torchrun(*words: object) -> Any:
    return run(*words, command=(*TORCHRUN, "-m", "causalrope_sp"))


def test_two_ranks_make_the_same_video_as_one(tmp_path: Path) -> None:
    words = ("generate", PROMPT, "--model", MODEL, "--frames", 30, "--json", "--out")
    one = json.loads(shell(*words, f"{tmp_path}/one/").output)
    done = torchrun(*words, f"{tmp_path}/two/")
    assert done.returncode == 0, done.stderr
    two = json.loads(done.stdout.splitlines()[-1])
    assert (one["ranks"], two["ranks"], len(done.stdout.splitlines())) == (1, 2, 1)
    assert two["strategy"] in strategies(2, 6)
    assert one["communication"] == {}
    assert two["communication"]["latents"]["calls"] == len(two["chunks"])
    assert all(kind["bytes"] > 0 for name, kind in two["communication"].items() if name != "agreement")
    error = np.mean((pictures(tmp_path / "one") - pictures(tmp_path / "two")) ** 2)
    assert error < 255**2 / 10**6  # PSNR > 60 dB


def test_a_decode_rank_makes_the_same_video(tmp_path: Path) -> None:
    words = ("generate", PROMPT, "--model", MODEL, "--frames", 30, "--json", "--out")
    assert shell(*words, f"{tmp_path}/one/", "--decode", "overlap").exit_code == 0
    done = torchrun(*words, f"{tmp_path}/two/", "--decode-ranks", 1)
    assert done.returncode == 0, done.stderr
    moved = json.loads(done.stdout)["communication"]
    assert moved["pixels"]["bytes"] == 30 * 64 * 64 * 3 + 3 * 4 * 8  # frames, and a head a chunk
    error = np.mean((pictures(tmp_path / "one") - pictures(tmp_path / "two")) ** 2)
    assert error < 255**2 / 10**6


def test_embeddings_that_were_encoded_make_the_video_of_their_prompt(tmp_path: Path) -> None:
    file = tmp_path / "e.safetensors"
    written = json.loads(shell("encode", PROMPT, "--seed", 4, "--out", file, "--json").output)
    assert written.pop("seconds") >= 0
    assert written == {
        "prompt": PROMPT,
        "encoder": "toybox",
        "length": 2,
        "shape": [1, 3, 51],
        "dtype": "float32",
        "out": str(file),
    }
    words = ("--model", MODEL, "--frames", 5, "--seed", 4, "--json", "--out")
    assert shell("generate", PROMPT, *words, f"{tmp_path}/a/").exit_code == 0
    assert shell("generate", "--text-embeds", file, *words, f"{tmp_path}/b/").exit_code == 0
    assert np.array_equal(pictures(tmp_path / "a"), pictures(tmp_path / "b"))
    done = torchrun("generate", "--text-embeds", file, *words, f"{tmp_path}/c/")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["communication"]["text"]["calls"] == 1
    assert np.mean((pictures(tmp_path / "a") - pictures(tmp_path / "c")) ** 2) < 255**2 / 10**6


def test_under_torchrun_only_rank_0_speaks_of_wrong_input(tmp_path: Path) -> None:
    done = torchrun("generate", PROMPT, "--model", MODEL, "--window", 1, "--out", tmp_path / "a.mp4")
    assert done.returncode != 0
    assert done.stderr.count("window 1 is smaller than") == 1
    assert [line.split()[2] for line in done.stderr.splitlines() if "exitcode  :" in line] == ["2", "2"]
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="finds the ranks' processes in /proc")
def test_a_rank_that_dies_ends_the_other(tmp_path: Path, start_endless: StartEndless) -> None:
    out = tmp_path / "a.mp4"
    process = start_endless(out, TORCHRUN)
    ranks = ranks_of(process.pid)
    assert sorted(ranks) == [0, 1]
    killed = time.monotonic()
    os.kill(ranks[1], signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert time.monotonic() - killed < 30
    assert process.returncode != 0
    assert f"Signal 9 (SIGKILL) received by PID {ranks[1]}" in errors
    assert not any(os.path.exists(f"/proc/{pid}") for pid in ranks.values())
    assert frames_in(out) > 0


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="finds the ranks' processes in /proc")
def test_a_rank_that_is_stopped_is_named_and_ends_the_other(tmp_path: Path, start_endless: StartEndless) -> None:
    out = tmp_path / "a.mp4"
    process = start_endless(out, TORCHRUN, "--timeout", "8")
    ranks = ranks_of(process.pid)
    os.kill(ranks[1], signal.SIGSTOP)
    _, errors = process.communicate(timeout=90)  # torchrun gives the stopped one half a minute before it kills it
    assert process.returncode != 0
    assert re.search(r"error: rank 1 is stopped: its process \d+ has stood still for 5 s", errors)
    assert not any(os.path.exists(f"/proc/{pid}") for pid in ranks.values())
    assert frames_in(out) > 0


def test_an_interrupted_torchrun_keeps_the_frames_so_far(tmp_path: Path, start_endless: StartEndless) -> None:
    process = start_endless(tmp_path / "a.mp4", TORCHRUN)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does it: the launcher and every rank
    _, errors = process.communicate(timeout=30)
    frames = frames_in(tmp_path / "a.mp4")
    assert frames > 0
    assert f"stopped: {frames} frames are in {tmp_path}/a.mp4\n" in errors
    assert "is gone" not in errors
    assert os.listdir(tmp_path) == ["a.mp4"]


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="rank 0 sees the end of rank 1 in /proc")
def test_an_interrupted_rank_0_ends_with_130_though_rank_1_ended_first(
    tmp_path: Path, start_endless: StartEndless
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = ["MASTER_ADDR=127.0.0.1", f"MASTER_PORT={port}", "WORLD_SIZE=2", "LOCAL_WORLD_SIZE=2"]
    commands = [["env", *shared, f"RANK={rank}", f"LOCAL_RANK={rank}", sys.executable] for rank in (0, 1)]
    out = tmp_path / "a.mp4"
    words = ["-m", "causalrope_sp", "generate", PROMPT, "--endless", "--window", "9", "--model", MODEL]
    with subprocess.Popen([*commands[1], *words, "--out", out], stderr=subprocess.PIPE, text=True, cwd=ROOT) as other:
        try:
            process = start_endless(out, commands[0])
            for each in (other, process):
                each.send_signal(signal.SIGINT)
            _, others_errors = other.communicate(timeout=30)
            _, errors = process.communicate(timeout=30)
        finally:
            other.kill()
    assert (other.returncode, process.returncode) == (130, 130)
    assert f"stopped: {frames_in(out)} frames are in {out}\n" in errors
    assert "error" not in others_errors + errors


def ranks_of(launcher: int) -> dict[int, int]:
    """Process ids by rank."""
    found = {}
    for pid in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        variables = Path(f"/proc/{pid}/environ").read_text().split("\0")
        found.update({int(v.removeprefix("RANK=")): int(pid) for v in variables if v.startswith("RANK=")})
    return found


def test_the_torchrun_example_runs(tmp_path: Path) -> None:
    done = run(PROMPT, tmp_path / "a.mp4", 11, command=(*TORCHRUN, "examples/stream_sp.py"))
    assert done.returncode == 0, done.stderr
    assert f"11 frames from 2 ranks in {tmp_path}/a.mp4" in done.stdout
    assert frames_in(tmp_path / "a.mp4") == 11
