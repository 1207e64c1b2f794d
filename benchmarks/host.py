"""Measures what a pass costs besides its arithmetic: the host's time for a layer, by torch and by Triton's launch path
on a GPU that this machine need not have, and passes on one CPU thread.

    git worktree add ../before ace63fc
    python benchmarks/host.py --before ../before

Every case runs in a process of its own for each build, in turn with the others, so that all of them meet the same
load; times are processor time, ratios are medians over the rounds. Without `--before` only this build and diffusers are
timed. The last line is JSON.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from statistics import median

import click
from printed import finish, print_table, stop

HERE = Path(__file__).resolve().parent
NOW, BEFORE, PEER = "now", "before", "diffusers"
CASES = ("layer, triton", "layer, torch", "toybox chunk", "D 768 pass, float32", "D 768 pass, bfloat16")


class Worker:
    """A process that runs one case of one build."""

    def __init__(self, root: Path, case: str) -> None:
        path = os.pathsep.join(map(str, (root, root / "kernels", HERE)))
        environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(HERE / "host_worker.py"), case]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment)
        if self._answer() != "ready":
            stop(f"{case} does not run in {root}")

    def _answer(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def run(self) -> str:
        """Runs the case once and returns what the worker answers."""
        assert self._process.stdin is not None
        self._process.stdin.write("run\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def times(jobs: dict[str, tuple[Path, str]], rounds: int) -> dict[str, list[float]]:
    """Runs some cases in turn and returns the microseconds of each by the job's name."""
    workers = {name: Worker(root, case) for name, (root, case) in jobs.items()}
    found: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(rounds):
        for name, worker in workers.items():
            found[name].append(float(worker.run()))
    for worker in workers.values():
        worker.close()
    return found


def ratio(found: dict[str, list[float]], over: str, under: str) -> float | None:
    """The median over the rounds of the ratio of two jobs, or None where one did not run."""
    if over not in found or under not in found:
        return None
    return round(median(a / b for a, b in zip(found[over], found[under], strict=True)), 3)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--before", type=click.Path(exists=True, file_okay=False, path_type=Path), help="Another build's checkout."
)
@click.option("--rounds", default=15, show_default=True, type=click.IntRange(min=1))
def main(before: Path | None, rounds: int) -> None:
    """Times the cases of this build beside another build and diffusers."""
    rows, builds = [], {NOW: HERE.parent} | ({} if before is None else {BEFORE: before.resolve()})
    for case in CASES:
        jobs = {name: (root, case) for name, root in builds.items()}
        if case.startswith("layer"):
            jobs[PEER] = HERE.parent, "layer, diffusers"
        if case == "D 768 pass, bfloat16" and before is not None:
            jobs[BEFORE] = before.resolve(), "D 768 pass, float32"
        found = times(jobs, rounds)
        micros = {name: round(median(each)) for name, each in found.items()}
        rows.append((case, *(micros.get(name) for name in (NOW, BEFORE, PEER)), ratio(found, NOW, BEFORE),
                     ratio(found, NOW, PEER)))  # fmt: skip
    columns = "case", "now, µs", "before, µs", "diffusers, µs", "now / before", "now / diffusers"
    print_table(columns, rows)
    counts = []
    for name, root in builds.items():
        for attention in ("triton", "torch"):
            worker = Worker(root, f"calls, {attention} attention")
            launches, calls = map(float, worker.run().split())
            worker.close()
            counts.append((name, attention, round(launches, 1), round(calls, 1)))
    print_table(("build", "attention by", "launches a layer", "torch calls a layer"), counts)
    finish("host", rounds=rounds, rows=[dict(zip(columns, row, strict=True)) for row in rows], counts=counts)


if __name__ == "__main__":
    main()
