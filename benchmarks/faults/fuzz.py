"""Gives mutated files, options, prompts and variables to every reader, and prints what each raised and cost.

    python benchmarks/faults/fuzz.py --mutations 25000               # guided by coverage, if atheris is installed
    python benchmarks/faults/fuzz.py --mutations 500 --reader lora --plain

A reader may raise errors of the library alone, within 2 s and 500 MB beyond what the process has. The seeds are in
`corpus/`; the smallest input of every fault is written to --found. `pip install atheris` makes libFuzzer choose what is
mutated further by the lines of the library that it reaches. Commands write what their options say: do not run it as
root on a machine that others use.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import click

sys.path.insert(0, str(Path(__file__).parent))
from fuzz_readers import READERS
from fuzz_worker import State

MOST_ENDS = 20  # of workers that crash or hang, a reader
COSTS = ("slow", "large")


def fuzz(name: str, count: int, seed: int, guided: bool) -> State:
    """Reads `count` inputs with one reader, in processes that are started again where one crashes or hangs."""
    total = State()
    for attempt in range(MOST_ENDS):
        with tempfile.TemporaryDirectory() as home:
            folder = Path(home)
            rest, way = count - total.inputs, "guided" if guided else "plain"
            words = [name, str(rest), str(seed + attempt), home, way]
            command = [sys.executable, str(Path(__file__).with_name("fuzz_worker.py")), *words]
            done = subprocess.run(command, capture_output=True, text=True)
            file = folder / "state.json"
            part = State(**json.loads(file.read_text())) if file.is_file() else State()
            _add(total, part)
            if total.inputs >= count:
                return total
            data = (folder / "input").read_bytes() if (folder / "input").is_file() else b""
            total.inputs += 1
            said = (folder / "said").read_text(errors="replace") if (folder / "said").is_file() else ""
            total.add_fault("process ended", f"status {done.returncode}: {(said + done.stderr)[-1500:]}", data)
    return total


def _add(total: State, part: State) -> None:
    total.inputs += part.inputs
    total.refused += part.refused
    total.slowest_s = max(total.slowest_s, part.slowest_s)
    total.largest_bytes = max(total.largest_bytes, part.largest_bytes)
    for place, (count, message, data) in part.faults.items():
        for _ in range(count):
            total.add_fault(place, message, bytes.fromhex(data))


@click.command()
@click.option(
    "--mutations", default=2400, show_default=True, type=click.IntRange(1), help="Read so many inputs in all."
)
@click.option("--seed", default=0, show_default=True, help="Draw all mutations from this seed.")
@click.option("--reader", "names", multiple=True, type=click.Choice(list(READERS)), help="Use this reader alone.")
@click.option("--plain", is_flag=True, help="Draw mutations from the seed alone, even if atheris is installed.")
@click.option("--found", type=click.Path(path_type=Path), help="Write the smallest input of each fault to this folder.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object at the end.")
def main(mutations: int, seed: int, names: tuple[str, ...], plain: bool, found: Path | None, as_json: bool) -> None:
    """Runs all readers and prints a table; the exit status is 1 if one raised something raw or cost too much."""
    guided = not plain and importlib.util.find_spec("atheris") is not None
    chosen = names or tuple(READERS)
    each = -(-mutations // len(chosen))
    click.echo(f"{'reader':>22} {'inputs':>7} {'refused':>7} {'raw':>5} {'slowest':>8} {'largest':>8}")
    states: dict[str, State] = {}
    for name in chosen:
        states[name] = state = fuzz(name, each, seed, guided)
        raw = sum(count for place, (count, _, _) in state.faults.items() if place not in COSTS)
        costs = f"{state.slowest_s:6.2f} s {state.largest_bytes / 1e6:5.0f} MB"
        click.echo(f"{name:>22} {state.inputs:7} {state.refused:7} {raw:5} {costs}")
        for number, (place, (count, message, data)) in enumerate(sorted(state.faults.items())):
            click.echo(f"    {count} × {place}: {message}", err=True)
            if found is not None:
                found.mkdir(parents=True, exist_ok=True)
                (found / f"{name}-{number}").write_bytes(bytes.fromhex(data))
    total = sum(state.inputs for state in states.values())
    broken = sum(count for state in states.values() for count, _, _ in state.faults.values())
    click.echo(f"{total} inputs, {broken} faults, {'guided by coverage' if guided else 'mutations alone'}")
    if as_json:
        click.echo(json.dumps({name: asdict(state) for name, state in states.items()}))
    sys.exit(1 if broken else 0)


if __name__ == "__main__":
    main()
