"""What one rank does in a trial of ranks that part ways: a list of steps, and what is changed in one rank's list.

Every rank of a trial runs the same program: two streams whose chunks are taken by turns (one after the other where
streams prefetch). A fault changes the program of one rank.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

STREAMS = ("first", "second")
CHUNKS = 2
STEPS = 2
PARTINGS = (
    "none",
    "slow",
    "order",
    "drop",
    "leave",
    "another call",
    "wrong input",
    "raise",
    "catch",
    "callback",
    "caught callback",
    "exit",
    "close the group",
    "threads",
    "reopen",
)
DECODES = ("inline", "overlap", "spatial", "decode rank")


@dataclass(frozen=True)
class Step:
    """One step of a rank: `do` is open, next, close, save, raise, catch, exit, pause, end or reopen."""

    do: str
    stream: str = ""


@dataclass(frozen=True)
class Program:
    """All that one rank does.

    Args:
        steps: in order.
        callback: a stream, a chunk and a step at which the callback raises; None for a callback that does not.
        threads: whether each stream's steps run in a thread of their own.
    """

    steps: tuple[Step, ...]
    callback: tuple[str, int, int] | None = None
    threads: bool = False


def common(decode: str) -> Program:
    """The program of a rank without a fault: chunks by turns, or one stream after the other where they prefetch."""
    first, second = ([Step("open", name), *[Step("next", name)] * CHUNKS, Step("close", name)] for name in STREAMS)
    if decode in ("overlap", "decode rank"):
        return Program((*first, *second))
    return Program(tuple(step for pair in zip(first, second, strict=True) for step in pair))


def changed(program: Program, parting: str, draw: random.Random) -> Program:
    """The program of the rank at fault, drawn at random."""
    steps = list(program.steps)
    at = draw.randrange(len(steps))
    if parting == "order":
        later = [n for n in range(len(steps) - 1) if steps[n].stream != steps[n + 1].stream]
        swap = draw.choice(later)
        steps[swap], steps[swap + 1] = steps[swap + 1], steps[swap]
    elif parting == "drop":
        dropped = steps.pop(draw.choice([n for n, step in enumerate(steps) if step.do in ("open", "next")]))
        if dropped.do == "open":
            steps = [step for step in steps if step.stream != dropped.stream]
    elif parting == "leave":
        left = draw.choice([n for n, step in enumerate(steps) if step.do == "next"])
        name = steps[left].stream
        steps = [step for n, step in enumerate(steps) if n < left or step.stream != name]
        steps.insert(left, Step("close", name))
    elif parting in ("callback", "caught callback"):
        raises = draw.choice(STREAMS), draw.randrange(CHUNKS), draw.randrange(STEPS)
        return replace(program, callback=raises)
    else:
        do = {"another call": "save", "wrong input": "wrong", "close the group": "end", "slow": "pause"}
        steps.insert(at, Step(do.get(parting, parting)))
    return replace(program, steps=tuple(steps))
