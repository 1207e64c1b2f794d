"""Every kernel compiles for every architecture, as it is launched, without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.support.paths import ROOT

SCRIPT = ROOT / "benchmarks" / "compile_kernels.py"


@pytest.mark.timeout(600)
def test_no_kernel_spills_and_the_table_is_what_was_compiled() -> None:
    """In a process of its own: here the kernels are interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, str(SCRIPT)], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    rows = json.loads(run.stdout.splitlines()[-1])["rows"]
    assert {row["architecture"] for row in rows} == {80, 90, 100, 120}
    assert {row["kernel"] for row in rows} == {
        "add_norm", "attention", "merge", "pieces", "projection", "quantize", "rms_norm", "split"
    }  # fmt: skip
    assert not any(row["spilled"] for row in rows)
