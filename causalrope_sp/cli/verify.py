"""`causalrope-sp verify`."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from causalrope_sp.errors import ConfigError

if TYPE_CHECKING:
    from causalrope_sp.verification.runner import Check


@click.command()
@click.argument(
    "folder", metavar="[DIR]", required=False, type=click.Path(exists=True, file_okay=False, path_type=Path)
)
@click.option("--ranks", default="1,2,3", show_default=True, help="How many processes to run each case on.")
@click.option("--strategy", default="all", show_default=True, help="all, or one strategy's name.")
@click.option("--dtype", type=click.Choice(["float64", "float32", "bfloat16"]), default="float64", show_default=True)
@click.option("--device", default="cpu", show_default=True, help="cpu or cuda.")
@click.option("--json", "as_json", is_flag=True, help="A list of objects: case, ranks, strategy, error, ok.")
def verify(folder: Path | None, ranks: str, strategy: str, dtype: str, device: str, as_json: bool) -> int:
    """Checks the numbers on this machine: the reference cases in DIR, or else small random models.

    Starts the processes itself. Exit status 1 if a check fails.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("verify starts its own processes: run it without torchrun")
    counts = _parse_ranks(ranks)
    import torch

    from causalrope_sp.verification.runner import run_verification

    checks = run_verification(folder, counts, strategy, getattr(torch, dtype), device)
    if as_json:
        click.echo(json.dumps([_check_fields(check) for check in checks]))
    else:
        _print_table(checks)
    return 1 if any(check.ok is False for check in checks) else 0


def _parse_ranks(text: str) -> list[int]:
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise ConfigError(f"--ranks takes numbers of processes like 1,2,3, not {text!r}") from None


def _check_fields(check: Check) -> dict[str, Any]:
    error = check.error if check.error is not None and math.isfinite(check.error) else None  # JSON has no NaN
    return {"case": check.case, "ranks": check.ranks, "strategy": check.strategy, "error": error, "ok": check.ok}


def _print_table(checks: list[Check]) -> None:
    from rich.console import Console
    from rich.table import Table

    verdicts = {True: "[green]ok[/]", False: "[bold red]FAILED[/]", None: "[yellow]skipped[/]"}
    table = Table("case", "ranks", "strategy", "relative error", "verdict", "")
    for check in checks:
        error = "" if check.error is None else f"{check.error:.2e}"
        table.add_row(check.case, str(check.ranks), check.strategy, error, verdicts[check.ok], check.note)
    console = Console()
    console.print(table)
    console.print(f"{sum(check.ok is True for check in checks)} of {len(checks)} checks passed", highlight=False)
