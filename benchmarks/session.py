"""Measures what can be done to a live session between two chunks, in processor time of one thread, against the time of
a chunk and of loading the model in the same run.

    python benchmarks/session.py [--model toybox] [--rounds 9]

Gate: a prompt that is set again to what it was changes no pixel by more than rounding, chunks that are taken back come
again bit for bit, and a saved session goes on bit for bit. Medians follow; the last line is JSON.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import numpy as np
import torch
from printed import finish, print_table

from causalrope_sp import CausalVideoPipeline
from causalrope_sp.pipeline.session import Session

RED, BLUE = "a red circle slides right", "a blue circle slides right"
FILLED = 7  # chunks after which toybox's window is full


def spent(run: Callable[[], Any]) -> float:
    """Seconds of the processor."""
    started = time.process_time()
    run()
    return time.process_time() - started


def opened(pipe: CausalVideoPipeline, chunks: int, **options: Any) -> Session:
    session = pipe.open(RED, seed=3, **options)
    for _ in range(chunks):
        session.step()
    return session


def forked(session: Session) -> None:
    session.fork().close()


def check(pipe: CausalVideoPipeline) -> None:
    plain, again = opened(pipe, FILLED), opened(pipe, FILLED, history=2)
    again.set_prompt(RED, recache=False)
    expected = plain.step().frames
    apart = np.abs(expected.astype(int) - again.step().frames).max()  # type: ignore[union-attr]
    assert apart <= 1, f"the same text again changed a pixel by {apart}"
    assert again.rewind(1), "a chunk within the history was not taken back exactly"
    retaken = np.abs(expected.astype(int) - again.step().frames).max()  # type: ignore[union-attr]
    assert retaken <= 1, f"a chunk that was taken back came again otherwise, by {retaken}"
    with TemporaryDirectory() as folder:
        plain.save(Path(folder) / "s")
        resumed = pipe.resume(Path(folder) / "s")
    assert np.array_equal(plain.step().frames, resumed.step().frames), "a saved session went on otherwise"  # type: ignore[arg-type]


def saved(pipe: CausalVideoPipeline, file: Path, rows: dict[str, list[float]], elapsed: list[float]) -> None:
    """Saves a session in both forms and goes on with them; `elapsed` gets what a chunk and saving take on the clock."""
    session = opened(pipe, FILLED)
    for name, cache in (("saving", True), ("saving without keys and values", False)):
        started = time.perf_counter()
        rows.setdefault(name, []).append(spent(partial(session.save, file, cache=cache)))
        elapsed.append(time.perf_counter() - started)
        resuming = name.replace("saving", "resuming")
        rows.setdefault(resuming, []).append(spent(lambda: pipe.resume(file).close()))
    elapsed.append(session.step().timings.total)


def change(pipe: CausalVideoPipeline, recache: bool) -> tuple[float, float]:
    """Seconds of a chunk, and those from a new prompt to the frames of the chunk under it."""
    session = opened(pipe, FILLED)
    usual = spent(session.step)
    return usual, spent(lambda: (session.set_prompt(BLUE, recache=recache), session.step()))


@click.command()
@click.option("--model", default="toybox", show_default=True)
@click.option("--rounds", default=9, show_default=True)
def main(model: str, rounds: int) -> None:
    torch.set_num_threads(1)
    loads = [spent(lambda: CausalVideoPipeline.from_pretrained(model)) for _ in range(3)]
    pipe = CausalVideoPipeline.from_pretrained(model)
    check(pipe)
    rows: dict[str, list[float]] = {}
    elapsed: list[list[float]] = [[] for _ in range(rounds)]
    for number in range(rounds):
        for name, recache in (("a new prompt, window computed anew", True), ("a new prompt alone", False)):
            usual, changed = change(pipe, recache)
            rows.setdefault("a chunk", []).append(usual)
            rows.setdefault(name, []).append(changed - usual)
        rows.setdefault("opening a second session", []).append(spent(lambda: pipe.open(BLUE).close()))
        rows.setdefault("first frames of a second session", []).append(spent(lambda: pipe.open(BLUE).step()))
        session = opened(pipe, FILLED, history=3)
        rows.setdefault("taking 2 chunks back within the history", []).append(spent(partial(session.rewind, 2)))
        bare = opened(pipe, FILLED)
        rows.setdefault("taking 2 chunks back without", []).append(spent(partial(bare.rewind, 2)))
        rows.setdefault("a fork", []).append(spent(partial(forked, session)))
        with TemporaryDirectory() as folder:
            saved(pipe, Path(folder) / "s", rows, elapsed[number])
    found = {name: statistics.median(values) for name, values in rows.items()}
    chunk, load = found["a chunk"], statistics.median(loads)
    table = [(name, f"{1e3 * s:.1f}", f"{s / chunk:.2f}", f"{s / load:.2f}") for name, s in found.items()]
    print_table(["", "ms of the processor", "of a chunk", "of loading"], table)
    whole, small, clock = (statistics.median(times) for times in zip(*elapsed, strict=True))
    print(f"\nOn the clock saving takes {whole / clock:.2f} of a chunk, without keys and values {small / clock:.2f}.")
    finish("session", model=model, rounds=rounds, load_s=load, seconds=found, elapsed_s=[whole, small, clock])


if __name__ == "__main__":
    main()
