"""Commands run in this process, as a process and under torchrun, and the videos that they leave."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
from click.testing import CliRunner, Result
from PIL import Image

from causalrope_sp.cli.main import cli
from tests.support.paths import ROOT

MODEL = "toybox"
PROMPT = "a red circle slides right"
StartEndless = Callable[..., subprocess.Popen[str]]


def shell(*words: object) -> Result:
    return CliRunner().invoke(cli, [str(word) for word in words])


def run(*words: object, command: tuple[str, ...] = (sys.executable, "-m", "causalrope_sp")) -> Any:
    line = [*command, *map(str, words)]
    return subprocess.run(line, capture_output=True, text=True, timeout=120, cwd=ROOT)


def launch_endless(
    out: Path, command: list[str], words: list[str], started: list[subprocess.Popen[str]]
) -> subprocess.Popen[str]:
    line = [*command, "-m", "causalrope_sp", "generate", *words, "--endless", "--window", "9"]
    line += ["--model", MODEL, "--out", str(out)]
    process = subprocess.Popen(
        line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, start_new_session=True
    )
    started.append(process)
    deadline = time.monotonic() + 120
    while not any(part.stat().st_size > 1000 for part in out.parent.glob("*.partial*")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return process


def frames_in(path: Path) -> int:
    with av.open(str(path)) as container:
        return sum(1 for _ in container.decode(video=0))


def pictures(folder: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(name)) for name in sorted(folder.glob("*.png"))]).astype(float)
