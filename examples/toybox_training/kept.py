"""Tensors that take long to make, kept in a file for the next run."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import click
import torch
from torch import Tensor

from .training import processes, rank

BATCH = 16  # scenes that are encoded at a time
Tensors = dict[str, Tensor]


def kept(path: Path, made_from: Sequence[float], make: Callable[[], Tensors]) -> Tensors:
    """Returns this process's tensors of `path`, or makes and writes them if there are none that were made from the same
    numbers by as many processes. Each process has a file of its own, `path` with its rank."""
    path, made_from = path.with_suffix(f".{rank()}.pt"), [processes(), *made_from]
    if path.exists():
        try:
            saved = dict(torch.load(path, map_location="cpu", weights_only=True))
        except Exception:  # torch raises many kinds where a file is cut off or is another one
            saved = {}
        if saved.pop("made_from", None) == made_from:
            return saved
        print(f"{path} was made with other settings or weights, or cannot be read; it is made again", flush=True)
    found, partial = make(), path.with_suffix(".partial")
    torch.save({"made_from": made_from, **found}, partial)
    partial.replace(path)
    return found


def check_count(option: str, count: int) -> None:
    """Refuses fewer scenes than one batch for each process; of more, whole batches are used."""
    if count < BATCH * processes():
        raise click.UsageError(
            f"{option}: expected at least {BATCH} a process, in all {BATCH * processes()}, not {count}"
        )


def fingerprint(*tensors: Tensor) -> int:
    """Returns a number that changes with the values of tensors, whatever device they are on."""
    found = 0
    for tensor in tensors:
        found = zlib.crc32(tensor.detach().float().cpu().contiguous().numpy().tobytes(), found)
    return found


def progress(what: str, done: int, total: int) -> None:
    """Prints how many of this process's videos are done, on one line that the last one ends."""
    print(f"\r{what}: {done} of {total} videos", end="\n" if done >= total else "", flush=True)
