"""What the commands that measure a model have in common: options, and the models that they take."""

from __future__ import annotations

from pathlib import Path

import click

from causalrope_sp.cli.numbers import SEED
from causalrope_sp.errors import ConfigError

PROMPTS = click.argument("prompts", nargs=-1, required=True)
SEEDS = click.option(
    "--seed",
    type=SEED,
    default=0,
    show_default=True,
    help="Use this seed for the first prompt, and the following ones for the others.",
)
PLOT = click.option(
    "--plot",
    type=click.Path(path_type=Path),
    help="Draw what was measured into this .png, .svg or .pdf. The default is no plot.",
)
AS_JSON = click.option("--json", "as_json", is_flag=True, help="Print one line of JSON. The default is a text.")


def check_causal(model: str, what: str = "where nothing is reused") -> None:
    """Raises ConfigError for a model that is not profiled; `what` says why in the words of a command."""
    from causalrope_sp.pipeline.load_options import LoadOptions
    from causalrope_sp.pipeline.model_source import find_model

    config = find_model(model, LoadOptions())
    if config.vin is not None or config.transformer_2 is not None:
        why = "makes its chunks in parallel" if config.vin is not None else "has two transformers"
        raise ConfigError(f"{model} {why}, {what}")
