"""The output of the benchmarks: tables, the last line in JSON, and a refusal."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from itertools import chain
from typing import Any, NoReturn

import click
import torch


def print_table(columns: Sequence[str], lines: Iterable[Sequence[object]]) -> None:
    """Prints a markdown table, as the log has them; each line as soon as `lines` yields it."""
    for cells in chain((columns, ["---"] * len(columns)), lines):
        print("| " + " | ".join("-" if cell is None else str(cell) for cell in cells) + " |", flush=True)
    print()


def finish(benchmark: str, **found: Any) -> None:
    """Prints the last line, as JSON, with the versions that the numbers depend on; infinity and NaN are null."""
    versions = {"torch": torch.__version__, "triton": _triton()}
    print(json.dumps(_finite({"benchmark": benchmark, **versions, **found}), allow_nan=False))


def _finite(value: Any) -> Any:
    """The same value, with None in place of numbers that JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def stop(why: str) -> NoReturn:
    """Prints why the input is refused and exits with status 2."""
    click.echo(why, err=True)
    sys.exit(2)


def _triton() -> str | None:
    try:
        return version("triton")
    except PackageNotFoundError:
        return None
