"""Runs that have no end of their own."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.shell import PROMPT, StartEndless, launch_endless


@pytest.fixture
def start_endless() -> Iterator[StartEndless]:
    """Starts a run that would take hours and returns when its first frames are on the disk; ends what is left of it."""
    started: list[subprocess.Popen[str]] = []

    def start(out: Path, command: list[str], *options: str, prompt: str = PROMPT) -> subprocess.Popen[str]:
        return launch_endless(out, command, [prompt, *options], started)

    yield start
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
