"""Injects faults at random moments into `generate` and into scripts on several ranks, and checks what is left.

    python benchmarks/faults/run.py --trials 100                     # all kinds
    python benchmarks/faults/run.py --trials 100 --kind kill --who 0
    python benchmarks/faults/run.py --trials 15 --kind parting       # each way in which ranks part, once

A process is killed, stopped or interrupted, its disk is full, its consumer is slow or raises: all processes are gone in
time (12 s; 20 s after a stop), the rank at fault is named, no process and no temporary file is left, every frame but
those of the last chunk can be played, and the exit status is not 0. What holds of ranks that part is in `parting.py`.
"""

from __future__ import annotations

import contextlib
import json
import random
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import click

sys.path.insert(0, str(Path(__file__).parent))
from parting import Parting, PartingTrials
from programs import PARTINGS
from trial import Fault, Outcome, run_trial

KINDS = ("kill", "term", "int", "stop", "full disk", "raise", "slow")
PARTING = "parting"


def draw_fault(draw: random.Random, kind: str | None, who: int | None, most_ranks: int) -> Fault:
    """A fault that can happen: ranks are those of a launcher, and only a script raises or is slow."""
    chosen = kind or draw.choice(KINDS)
    script = chosen in ("raise", "slow") or (chosen != "full disk" and draw.random() < 0.5)
    ranks = draw.randint(1 if chosen not in ("stop",) else 2, most_ranks)
    victim: int | str = who if who is not None else draw.choice([*range(ranks), "launcher"])
    if victim == "launcher" and (chosen in ("raise", "slow", "full disk", "stop") or ranks == 1):
        victim = 0
    if isinstance(victim, int):
        victim = min(victim, ranks - 1)
    loading = chosen in ("kill", "term", "int") and draw.random() < 0.3
    return Fault(chosen, ranks, victim, script, loading)


@click.command()
@click.option("--trials", default=20, show_default=True, type=click.IntRange(1), help="Make so many trials.")
@click.option("--seed", default=0, show_default=True, help="Draw faults and moments from this seed.")
@click.option(
    "--kind",
    type=click.Choice([*KINDS, PARTING, *(f"{PARTING}: {name}" for name in PARTINGS)]),
    help="Inject this kind of fault alone. The default is all kinds.",
)
@click.option("--who", type=int, help="Inject it into this rank. The default is a random one, or the launcher.")
@click.option("--ranks", default=4, show_default=True, type=click.IntRange(1, 8), help="Start up to so many ranks.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object at the end.")
@click.option("--said", is_flag=True, help="Print what the processes said in trials that break an invariant.")
def main(trials: int, seed: int, kind: str | None, who: int | None, ranks: int, as_json: bool, said: bool) -> None:
    """Runs the trials and prints a table; the exit status is 1 if an invariant was broken."""
    outcomes: list[Outcome] = []
    with contextlib.ExitStack() as stack:
        parting_trials: PartingTrials | None = None
        for number in range(trials):
            draw = random.Random(seed + number)
            if (kind or draw.choice((PARTING, "process"))).startswith(PARTING):
                parting_trials = parting_trials or stack.enter_context(PartingTrials())
                name = (kind or PARTING).removeprefix(PARTING).removeprefix(": ")
                outcome = parting_trials.run(Parting.draw(draw, ranks, name or PARTINGS[number % len(PARTINGS)]), draw)
            else:
                outcome = run_trial(draw_fault(draw, kind, who, ranks), draw)
            outcomes.append(outcome)
            _print_outcome(number, outcome, said)
    rows = _table(outcomes)
    for row in rows:
        click.echo(f"{row['kind']:>24}: {row['held']} of {row['trials']} held, gone after {row['slowest_s']} s at most")
    if as_json:
        click.echo(json.dumps({"rows": rows, "broken": [str(o.fault) for o in outcomes if o.broken]}))
    sys.exit(1 if any(outcome.broken for outcome in outcomes) else 0)


def _print_outcome(number: int, outcome: Outcome, said: bool) -> None:
    verdict = "; ".join(outcome.broken) or "ok"
    gone = f"gone after {outcome.gone_s:.1f} s, {outcome.played} frames"
    click.echo(f"{number:4} {outcome.fault}: {verdict} ({gone})", err=True)
    if said and outcome.broken:
        click.echo(outcome.said, err=True)


def _table(outcomes: list[Outcome]) -> list[dict[str, Any]]:
    """One row a kind: how many trials there were, in how many all invariants held, and the longest time."""
    table: dict[str, list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        table[outcome.fault.kind].append(outcome)
    return [
        {
            "kind": name,
            "trials": len(of_kind),
            "held": sum(not outcome.broken for outcome in of_kind),
            "slowest_s": round(max(outcome.gone_s for outcome in of_kind), 1),
        }
        for name, of_kind in sorted(table.items())
    ]


if __name__ == "__main__":
    main()
