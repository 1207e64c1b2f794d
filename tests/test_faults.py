"""The short form of the fault trials: every kind of parted ranks once, and a rank that is killed, stopped or raises."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.support.paths import ROOT

pytestmark = pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="finds the ranks' processes in /proc")


def trials(*options: str) -> dict[str, dict[str, int]]:
    """Runs fault trials; returns the rows of their table by kind."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    line = [sys.executable, "benchmarks/faults/run.py", "--said", "--json", *options]
    done = subprocess.run(line, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr
    return {row["kind"]: row for row in json.loads(done.stdout.splitlines()[-1])["rows"]}


def test_ranks_that_part_ways_say_so_or_make_the_right_video() -> None:
    rows = trials("--trials", "15", "--kind", "parting", "--seed", "11", "--ranks", "2")
    assert len(rows) == 15
    assert all(row["held"] == row["trials"] == 1 for row in rows.values())


@pytest.mark.parametrize(("kind", "who"), [("kill", "0"), ("stop", "1"), ("raise", "1")])
def test_a_rank_that_is_lost_is_named_and_its_video_is_kept(kind: str, who: str) -> None:
    row = trials("--trials", "1", "--kind", kind, "--who", who, "--ranks", "2", "--seed", "1")[kind]
    assert row["held"] == 1
