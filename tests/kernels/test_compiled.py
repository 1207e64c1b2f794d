"""Every kernel compiles for every architecture, as it is launched, without a GPU."""

from __future__ import annotations

import ast
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


def test_no_function_of_a_kernel_returns_none() -> None:
    """Triton 3.6, the oldest that is allowed, cannot; the one that is installed here may."""
    found = list[str]()
    for path in sorted((ROOT / "kernels").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and "triton.jit" in map(ast.unparse, node.decorator_list):
                values = [x.value for x in ast.walk(node) if isinstance(x, ast.Return) and x.value is not None]
                found += [
                    f"{path.name}: {node.name}" for x in values if isinstance(x, ast.Constant) and x.value is None
                ]
    assert not found
