"""Every command of the README runs as it stands, in an empty folder."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT

BLOCKS = re.findall(r"^```(sh|python) *\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all blocks: later commands read what earlier ones wrote."""
    return tmp_path_factory.mktemp("readme")


def test_there_are_commands_of_both_kinds() -> None:
    assert {kind for kind, _ in BLOCKS} == {"sh", "python"}


@pytest.mark.parametrize(("kind", "block"), BLOCKS, ids=[f"{kind}{number}" for number, (kind, _) in enumerate(BLOCKS)])
def test_a_block_runs_as_it_stands(folder: Path, kind: str, block: str) -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-c", block] if kind == "python" else ["sh", "-e", "-c", block]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
