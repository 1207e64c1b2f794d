"""Trials of ranks that part ways: one rank's program differs from the others', and what every rank says is looked at.

Every rank must end within `LIMIT_S` of the last step that any rank took, either with the right frames and status 0, or
with a sentence that names a rank; a frame that was handed out is never wrong.
"""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from programs import DECODES, STREAMS, Program, Step, changed, common
from trial import Fault, Outcome, quiet_environment

RANKS = Path(__file__).with_name("parting_ranks.py")
OWN = ("a fault of the user's", "another stream is open", "num_frames must be")  # a rank's words on its own fault
LIMIT_S = 10.0
MOVES = ("began", "opened", "step", "chunk", "fault")  # notes of a rank that goes on
PATIENCE_S = 45.0
RAW = ("UnpicklingError", "DistNetworkError", "DistStoreError", "DistBackendError", "terminate called", "gloo/")
HARMLESS = ("none", "slow", "catch", "reopen")  # the ranks do not part: all of them must make the right video


@dataclass(frozen=True)
class Parting:
    """What goes wrong on which rank, and how the pipeline decodes."""

    parting: str
    ranks: int
    who: int
    decode: str

    @classmethod
    def draw(cls, draw: random.Random, most_ranks: int, parting: str) -> Parting:
        """Random ranks, 2 or more, and a random way of decoding."""
        ranks, decode = draw.randint(2, max(2, most_ranks)), draw.choice(DECODES)
        return cls(parting, ranks, draw.randrange(ranks), decode)

    def programs(self, draw: random.Random) -> list[Program]:
        """What each rank does."""
        base = common(self.decode)
        if self.parting == "reopen":
            base = Program((*base.steps, Step("reopen"), *base.steps))
        if self.parting == "threads":
            return [Program(base.steps, threads=True)] * self.ranks
        faulty = base if self.parting in ("none", "reopen") else changed(base, self.parting, draw)
        return [faulty if rank == self.who else base for rank in range(self.ranks)]

    def __str__(self) -> str:
        return f"parting: {self.parting}, {self.ranks} ranks, {self.who}, {self.decode}"


class PartingTrials:
    """Runs trials in processes that are forked from one that has everything loaded. Use it in a `with` block."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(RANKS)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=quiet_environment(),
        )
        self._ask, self._answers = self._process.stdin, self._process.stdout
        assert self._answers is not None, "a pipe"
        assert self._answers.readline() == "ready\n", "it has started"
        self._right: dict[tuple[int, str], dict[str, list[str]]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()

    def run(self, parting: Parting, draw: random.Random) -> Outcome:
        """Runs a trial and checks the invariants."""
        key = parting.ranks, parting.decode
        if key not in self._right:
            ended, notes, said = self._run(Parting("none", parting.ranks, 0, parting.decode), random.Random(0))
            assert all(rank["status"] == 0 for rank in ended), f"ranks that do not part: {said}"
            self._right[key] = _digests(notes[0])
        ended, notes, said = self._run(parting, draw)
        broken, digests = [], _digests(notes[0])
        moves = [note["at"] for rank in notes for note in rank if note["what"] in MOVES]
        gone = max(map(_end, notes, ended)) - max(moves)
        if gone > LIMIT_S:
            broken.append(f"gone after {gone:.0f} s, not {LIMIT_S:.0f}")
        for rank, end in enumerate(ended):
            broken += [f"rank {rank}: {what}" for what in _wrong_end(end["status"], said[rank])]
        right = self._right[key]
        if any(digests[name] != (2 * right[name])[: len(digests[name])] for name in STREAMS):
            broken.append("WRONG FRAMES")
        if parting.parting in HARMLESS and any(end["status"] != 0 for end in ended):
            broken.append("no rank parts, but one fails")
        fault = Fault(f"parting: {parting.parting}", parting.ranks, parting.who, True, False)
        frames = sum(len(of_stream) for of_stream in digests.values())
        return Outcome(fault, gone, ended[0]["status"], frames, "\n".join(said), tuple(broken))

    def _run(self, parting: Parting, draw: random.Random) -> tuple[list[Any], list[list[Any]], list[str]]:
        """How each rank ended, what it noted and what it said."""
        with tempfile.TemporaryDirectory() as folder:
            programs = [asdict(program) for program in parting.programs(draw)]
            for program in programs:
                program["steps"] = [list(step.values()) for step in program["steps"]]
            trial = {**asdict(parting), "programs": programs, "folder": folder, "patience_s": PATIENCE_S}
            assert self._answers is not None, "a pipe"
            print(json.dumps(trial), file=self._ask, flush=True)
            ended = json.loads(self._answers.readline())
            logs = [Path(folder) / f"rank{rank}" for rank in range(parting.ranks)]
            notes = [list(map(json.loads, log.with_suffix(".jsonl").read_text().splitlines())) for log in logs]
            return ended, notes, [log.with_suffix(".log").read_text(errors="replace") for log in logs]


def _digests(notes: list[dict[str, Any]]) -> dict[str, list[str]]:
    """The digests of the frames that rank 0 was given, by stream."""
    digests: dict[str, list[str]] = {name: [] for name in STREAMS}
    for note in notes:
        if note["what"] == "chunk":
            digests[note["stream"]].append(note["digest"])
    return digests


def _end(notes: list[dict[str, Any]], ended: dict[str, Any]) -> float:
    """When a rank ended; the second in which Python takes torch down is left out."""
    return next((note["at"] for note in notes if note["what"] == "ended"), ended["at"])


def _wrong_end(status: int | None, said: str) -> list[str]:
    """What is wrong with the end of one rank, in words."""
    if status is None:
        return ["still there"]
    wrong = [f"says {raw}" for raw in RAW if raw in said]
    if status < 0:
        wrong.append(f"ended by signal {-status}")
    own = any(words in said for words in OWN) or status == 3
    if status != 0 and not own and re.search(r"rank \d|ranks differ in .* on \d", said) is None:
        wrong.append("names no rank")
    return wrong
