"""`causalrope-sp inspect`."""

from __future__ import annotations

import json
from typing import Any

import click

from causalrope_sp.cli.options import parse_steps
from causalrope_sp.cli.runtime import rank


@click.command()
@click.argument("path")
@click.option("--part", help="Which model in the file: generator, generator_ema, ... (default: the averaged one).")
@click.option("--preset", help="How it runs: self-forcing, causvid, longlive-1.3b, ... (default: guessed).")
@click.option("--window", type=int, help="Latent frames that attention looks back over, in place of the preset's.")
@click.option("--sink", type=int, help="Latent frames of the very start that never leave the window.")
@click.option("--chunk-frames", type=int, help="Latent frames denoised together.")
@click.option("--steps", help="How many evenly spaced denoising steps (4), or which (1000,750,500,250).")
@click.option("--shift", type=float, help="Of the timesteps towards noise.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def inspect(path: str, part: str | None, preset: str | None, steps: str | None, as_json: bool, **run: Any) -> int:
    """Says what the checkpoint at PATH is, why, what it lacks, and how it would run.

    Exit status 1 if it could not be loaded as it is.
    """
    from causalrope_sp.cli import inspection
    from causalrope_sp.diffusion.schedule import timesteps

    parsed = parse_steps(steps)
    changes = {name: value for name, value in run.items() if value is not None}
    changes |= {} if parsed is None else {"steps": timesteps(parsed)}
    report = inspection.inspect(path, part, preset, changes)
    if rank() == 0:
        click.echo(json.dumps(inspection.fields(report)) if as_json else inspection.text(report))
    return 1 if report.problem else 0
