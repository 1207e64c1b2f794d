"""`causalrope-sp plan`: what every strategy would cost for a model on some ranks; nothing is run."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from causalrope_sp.cli.options import complete_model
from causalrope_sp.errors import ConfigError

if TYPE_CHECKING:
    from causalrope_sp.planning.machines import Machine

OVERRIDES = ("height", "width", "window", "sink", "chunk_frames", "steps", "guidance_scale", "guidance_interval")


@click.command()
@click.option(
    "--model",
    default="wan2.1-1.3b",
    show_default=True,
    shell_complete=complete_model,
    help="Plan for this model: wan2.1-1.3b, wan2.1-14b, toybox or a PATH.",
)
@click.option("--height", type=int, help="Make frames of so many pixels in height. The default is the model's.")
@click.option("--width", type=int, help="Make frames of so many pixels in width. The default is the model's.")
@click.option("--window", type=int, help="Let attention look back over so many latent frames.")
@click.option("--sink", type=int, help="Keep so many latent frames of the very start.")
@click.option("--chunk-frames", type=int, help="Denoise so many latent frames together.")
@click.option("--steps", type=int, help="Make so many denoise passes a chunk.")
@click.option("--guidance", "guidance_scale", type=float, help="Guide by this scale; any but 1 makes a second branch.")
@click.option("--guidance-interval", type=(float, float), help="Guide only the steps at timesteps between these two.")
@click.option("--reuse", help="Reuse attention outputs between steps by this policy: pab:latte, ..., or a JSON file.")
@click.option("--ranks", default=8, show_default=True, type=click.IntRange(1, 4096), help="Plan for so many ranks.")
@click.option(
    "--gpu", default="h100", show_default=True, help="Plan for this GPU a rank: h200, h100, a800, a100, l40s, ..."
)
@click.option(
    "--link", default="nvlink", show_default=True, help="Connect ranks by this link: nvlink, pcie, infiniband, ..."
)
@click.option(
    "--weights",
    type=click.Choice(["full", "fp8"]),
    default="full",
    show_default=True,
    help="Keep the transformer's matrices in full, or in 8 bits.",
)
@click.option(
    "--offload",
    multiple=True,
    default=["text"],
    show_default=True,
    metavar="text|codec|none",
    help="Keep this on the device only while it is used.",
)
@click.option("--measured", type=click.Path(path_type=Path), help="Take rates that were measured from this JSON file.")
@click.option("--plot", type=click.Path(path_type=Path), help="Draw fps and memory over 1 to 64 ranks into this file.")
@click.option("--json", "as_json", is_flag=True, help="Print one object: strategies, a list, and decoding.")
def plan(
    model: str,
    reuse: str | None,
    ranks: int,
    gpu: str,
    link: str,
    measured: Path | None,
    plot: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Predicts, for every strategy, memory, bytes and time of a stream on RANKS ranks; nothing is run."""
    from causalrope_sp.distributed.mesh import possible_cfg_sizes
    from causalrope_sp.pipeline.offload import Offload
    from causalrope_sp.pipeline.planned_model import PlannedModel
    from causalrope_sp.planning import cost, plan_report
    from causalrope_sp.reuse import find_policy

    policy, offload = None if reuse is None else find_policy(reuse), Offload.of(options["offload"])
    planned = PlannedModel.open(model).override(**{name: options[name] for name in OVERRIDES})
    work = dataclasses.replace(planned.workload(policy), fp8=options["weights"] == "fp8")
    on = describe_machine(gpu, link, measured)
    auxiliary = planned.auxiliary(work, offload, gpu == "cpu")
    costs = cost.plan(work, ranks, on, cfg_sizes=possible_cfg_sizes(work.guided > 0, ranks), auxiliary=auxiliary)
    decoding = planned.decoding(work, ranks, on)
    if plot is not None:
        plan_report.plot_plan(work, on, plot, auxiliary)
    if as_json:
        strategies = [plan_report.fields(c) for c in costs]
        click.echo(json.dumps({"strategies": strategies, "decoding": plan_report.decoding_fields(decoding)}))
    else:
        plan_report.print_plan(work, costs, on)
        if decoding is not None:
            plan_report.print_decoding(decoding, ranks)


def describe_machine(gpu: str, link: str, measured: Path | None) -> Machine:
    """Data sheets' rates, or those that were measured: a JSON object with any of a machine's fields, in SI units.

    Raises:
        ConfigError: a name that is not known, a file that cannot be read, or a field that a machine has not.
    """
    from causalrope_sp.planning.machines import GPUS, LINKS, Machine, machine

    for kind, name, known in (("gpu", gpu, GPUS), ("link", link, LINKS)):
        if name not in known:
            raise ConfigError(f"unknown {kind} {name!r}; there are: {', '.join(known)}; or give --measured rates")
    rates = machine(gpu, link)
    if measured is None:
        return rates
    try:
        found = json.loads(measured.read_text())
        names = {field.name for field in dataclasses.fields(Machine)} - {"name"}
        if not isinstance(found, dict) or set(found) - {"name"} - names:
            raise ValueError(f"it must be an object with some of {', '.join(sorted(names))}")
        if not all(type(v) in (int, float) and 1e-12 < v < 1e30 for k, v in found.items() if k != "name"):
            raise ValueError("every rate must be a number above 0")
        return dataclasses.replace(rates, **{**found, "name": f"measured ({measured.name})"})
    except (OSError, ValueError, RecursionError) as reason:
        raise ConfigError(f"cannot use the measured rates in {measured}: {reason}") from reason
