"""Scripts of the folder examples say how they are called, and do nothing else, when asked."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT

WITHOUT_ARGUMENTS = "fused_kernels.py"
SCRIPTS = sorted(path for path in (ROOT / "examples").glob("*.py") if path.name != WITHOUT_ARGUMENTS)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_says_how_it_is_called(script: Path, tmp_path: Path) -> None:
    asked = subprocess.run(
        [sys.executable, script, "-h"], cwd=tmp_path, text=True, capture_output=True, stdin=subprocess.DEVNULL
    )
    assert asked.returncode == 0, asked.stderr
    assert asked.stdout.startswith("Usage:")
    assert not any(tmp_path.iterdir())
