"""Threads of the command line: their number by what the process is granted, and waiting without spinning."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from causalrope_sp.cli.threads import settle_threads


@pytest.mark.parametrize(
    ("cpu_max", "threads"),
    [("max 100000", None), ("150000 100000", 1), ("50000 100000", 1), ("100000 100000", 1), ("nonsense", None)],
)
def test_the_number_is_what_the_control_group_grants(cpu_max: str, threads: int | None, tmp_path: Path) -> None:
    (tmp_path / "cpu.max").write_text(cpu_max + "\n")
    environment: dict[str, str] = {}
    settle_threads(environment, tmp_path)
    allowed = len(os.sched_getaffinity(0))
    assert environment == {
        "OMP_WAIT_POLICY": "PASSIVE",
        "OMP_NUM_THREADS": str(allowed if threads is None else min(threads, allowed)),
    }


def test_what_is_set_is_kept(tmp_path: Path) -> None:
    environment = {"OMP_NUM_THREADS": "7", "OMP_WAIT_POLICY": "ACTIVE"}
    settle_threads(environment, tmp_path)
    assert environment == {"OMP_NUM_THREADS": "7", "OMP_WAIT_POLICY": "ACTIVE"}


def test_torch_is_loaded_after_the_threads_are_settled() -> None:
    """The entry point sets them before anything that the commands import."""
    code = (
        "import sys, os; import causalrope_sp.cli.main as entry; assert 'torch' not in sys.modules; "
        "sys.argv = ['causalrope-sp', '--version']\n"
        "try: entry.main()\nexcept SystemExit: pass\n"
        "print(os.environ['OMP_WAIT_POLICY'], os.environ['OMP_NUM_THREADS'])"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    wait, threads = done.stdout.split()[-2:]
    assert wait == "PASSIVE"
    assert 1 <= int(threads) <= len(os.sched_getaffinity(0))
