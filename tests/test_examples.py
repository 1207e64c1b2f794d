"""Scripts of the folder examples say how they are called, and do nothing else, when asked."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[1] / "examples"
WITHOUT_OPTIONS = "fused_kernels.py"


def test_every_script_says_how_it_is_called(tmp_path: Path) -> None:
    scripts = [script for script in sorted(EXAMPLES.glob("*.py")) if script.name != WITHOUT_OPTIONS]
    assert len(scripts) >= 7
    asked = [
        subprocess.Popen([sys.executable, script, option], cwd=tmp_path, text=True, stdout=subprocess.PIPE)
        for script in scripts
        for option in ("-h", "--help")
    ]
    for process in asked:
        said, _ = process.communicate()
        assert process.returncode == 0, process.args
        assert said.startswith("Usage:"), process.args
    assert not any(tmp_path.iterdir())
