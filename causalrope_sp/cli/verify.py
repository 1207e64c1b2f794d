"""`causalrope-sp verify`: compares reference cases or random models across numbers of ranks and strategies."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from causalrope_sp.checks import shown
from causalrope_sp.config import CacheDtype
from causalrope_sp.errors import ConfigError, escaped_line
from causalrope_sp.rank_environment import RankEnvironment

if TYPE_CHECKING:
    from causalrope_sp.verification.runner import Check

MOST_RANKS = 64  # processes that the command starts on one machine


@click.command()
@click.argument(
    "folder", metavar="[DIR]", required=False, type=click.Path(exists=True, file_okay=False, path_type=Path)
)
@click.option("--ranks", default="1,2,3", show_default=True, help="Run each case on these numbers of ranks.")
@click.option("--strategy", default="all", show_default=True, help="Check this attention strategy, or all of them.")
@click.option(
    "--dtype",
    type=click.Choice(["float64", "float32", "bfloat16"]),
    default="float64",
    show_default=True,
    help="Compute in this dtype.",
)
@click.option(
    "--device",
    type=click.Choice(["cpu", "cuda"]),
    default="cpu",
    show_default=True,
    help="Compute on this kind of device.",
)
@click.option(
    "--cache",
    type=click.Choice(get_args(CacheDtype)),
    default="model",
    show_default=True,
    help="Store keys and values of the random models like this; ranks must still agree.",
)
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="Print a JSON list of objects with case, ranks, strategy, error and ok. The default is a table.",
)
def verify(
    folder: Path | None, ranks: str, strategy: str, dtype: str, device: str, cache: CacheDtype, as_json: bool
) -> int:
    """Checks the results of this machine against the reference cases in DIR, or with small random models.

    The command starts its processes itself. The exit status is 1 if a check fails.
    """
    if RankEnvironment.read().world_size > 1:
        raise ConfigError("verify starts its own processes: run it without torchrun")
    counts = _parse_ranks(ranks)
    import torch

    from causalrope_sp.verification.runner import run_verification

    checks = run_verification(folder, counts, strategy, getattr(torch, dtype), device, cache)
    if as_json:
        click.echo(json.dumps([_check_fields(check) for check in checks]))
    else:
        _print_table(checks)
    return 1 if any(check.ok is False for check in checks) else 0


def _parse_ranks(text: str) -> list[int]:
    """Numbers of ranks separated by commas; raises ConfigError for anything else."""
    words = text.split(",")
    if not all(word.isascii() and word.isdigit() and len(word) < 4 and 1 <= int(word) <= MOST_RANKS for word in words):
        raise ConfigError(f"--ranks takes numbers of processes like 1,2,3, at most {MOST_RANKS}, not {shown(text)}")
    return [int(word) for word in words]


def _check_fields(check: Check) -> dict[str, Any]:
    """A check as values that JSON can represent."""
    error = check.error if check.error is not None and math.isfinite(check.error) else None  # JSON has no NaN
    return {"case": check.case, "ranks": check.ranks, "strategy": check.strategy, "error": error, "ok": check.ok}


def _print_table(checks: list[Check]) -> None:
    from rich.console import Console
    from rich.table import Table

    verdicts = {True: "[green]ok[/]", False: "[bold red]FAILED[/]", None: "[yellow]skipped[/]"}
    table = Table("case", "ranks", "strategy", "relative error", "verdict", "")
    for check in checks:
        error = "" if check.error is None else f"{check.error:.2e}"
        case, note = escaped_line(check.case), escaped_line(check.note)
        table.add_row(case, str(check.ranks), check.strategy, error, verdicts[check.ok], note)
    console = Console()
    console.print(table)
    console.print(f"{sum(check.ok is True for check in checks)} of {len(checks)} checks passed", highlight=False)
