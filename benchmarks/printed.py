"""What the benchmarks print: tables, the last line, a refusal."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from itertools import chain
from typing import Any, NoReturn

import click
import torch


def print_table(columns: Sequence[str], lines: Iterable[Sequence[object]]) -> None:
    """As markdown, which the log takes as it is; a line as soon as it is there."""
    for cells in chain((columns, ["---"] * len(columns)), lines):
        print("| " + " | ".join("-" if cell is None else str(cell) for cell in cells) + " |", flush=True)
    print()


def finish(benchmark: str, **found: Any) -> None:
    """The last line, as JSON, with the versions that the figures depend on."""
    print(json.dumps({"benchmark": benchmark, "torch": torch.__version__, "triton": _triton(), **found}))


def stop(why: str) -> NoReturn:
    """Wrong input."""
    click.echo(why, err=True)
    sys.exit(2)


def _triton() -> str | None:
    try:
        return version("triton")
    except PackageNotFoundError:
        return None
