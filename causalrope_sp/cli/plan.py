"""`causalrope-sp plan`: predicts the costs of every attention strategy for a model; nothing is run."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from causalrope_sp.cli.model_options import (
    CACHE,
    CHUNK_FRAMES,
    GUIDANCE_INTERVAL,
    HEADS,
    HEIGHT,
    OFFLOAD,
    SIMILAR_FRAMES,
    SINK,
    WIDTH,
    WINDOW,
    WINDOW_POLICY,
)
from causalrope_sp.cli.numbers import FLOAT, INTEGER, IntRange
from causalrope_sp.cli.options import complete_model
from causalrope_sp.cli.whole_video import check_whole_video, plan_whole_video
from causalrope_sp.errors import ConfigError, printable
from causalrope_sp.io.json_files import read_object
from causalrope_sp.spatiotemporal.kinds import kind_of

if TYPE_CHECKING:
    from causalrope_sp.planning.machines import Machine

OVERRIDES = (
    "height",
    "width",
    "window",
    "sink",
    "chunk_frames",
    "window_policy",
    "similar_frames",
    "cache",
    "heads",
    "steps",
    "guidance_scale",
    "guidance_interval",
)


@click.command()
@click.option(
    "--model",
    default="wan2.1-1.3b",
    show_default=True,
    shell_complete=complete_model,
    help="Plan for this model: wan2.1-1.3b, wan2.1-14b, wan2.2-ti2v-5b, toybox or a PATH.",
)
@HEIGHT
@WIDTH
@WINDOW
@SINK
@CHUNK_FRAMES
@WINDOW_POLICY
@SIMILAR_FRAMES
@CACHE
@HEADS
@click.option("--steps", type=INTEGER, help="Make this many denoise passes per chunk. The default is the model's.")
@click.option(
    "--guidance",
    "guidance_scale",
    type=FLOAT,
    help="Set the scale of guidance; any but 1 adds an unconditional pass. The default is the model's.",
)
@GUIDANCE_INTERVAL
@click.option(
    "--reuse",
    help="Reuse attention outputs between steps by this policy: pab:latte, ... or a JSON file. The default is off.",
)
@click.option(
    "--sessions",
    default=1,
    show_default=True,
    type=IntRange(1, 4096),
    help="Plan for this many open sessions, whose chunks are made in turn.",
)
@click.option(
    "--history",
    default=0,
    show_default=True,
    type=IntRange(0, 2**20),
    help="Plan for sessions that can be taken back this many chunks bit for bit.",
)
@click.option(
    "--kept-chunks",
    default=0,
    show_default=True,
    type=IntRange(0, 2**20),
    help="Plan for sessions that keep the clean latents of this many chunks beyond the window.",
)
@click.option("--ranks", default=8, show_default=True, type=IntRange(1, 4096), help="Plan for this many ranks.")
@click.option(
    "--gpu",
    default="h100",
    show_default=True,
    help="Plan for one of these GPUs per rank: h200, h100, a800, a100, l40s, ...",
)
@click.option(
    "--link",
    help="Plan for ranks that this link connects: nvlink, pcie, ... The default is nvlink, or loopback for a cpu.",
)
@click.option(
    "--weights",
    type=click.Choice(["full", "fp8", "fp8-dynamic"]),
    default="full",
    show_default=True,
    help="Keep the transformer's matrices in full precision or in 8 bits, or compute their products in 8 bits as well.",
)
@OFFLOAD
@click.option(
    "--measured",
    type=click.Path(path_type=Path),
    help="Read measured rates from this JSON file. The default is the data sheets' rates.",
)
@click.option(
    "--plot",
    type=click.Path(path_type=Path),
    help="Draw fps and memory over 1 to 64 ranks into this file. The default is no plot.",
)
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="Print one JSON object: a list of strategies, decoding, and what is assumed. The default is tables.",
)
def plan(
    model: str,
    reuse: str | None,
    sessions: int,
    history: int,
    kept_chunks: int,
    ranks: int,
    gpu: str,
    link: str | None,
    measured: Path | None,
    plot: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Predicts memory, transferred bytes and time of a stream for every attention strategy; nothing is run."""
    from causalrope_sp.distributed.mesh import possible_cfg_sizes
    from causalrope_sp.pipeline.offload import Offload
    from causalrope_sp.pipeline.planned_model import PlannedModel
    from causalrope_sp.planning import cost, plan_report
    from causalrope_sp.reuse import find_policy

    policy, offload = None if reuse is None else find_policy(reuse), Offload.of(options["offload"])
    whole_video = kind_of(model)
    if whole_video is not None:
        check_whole_video(whole_video, options)
        on = describe_machine(gpu, link, measured)
        click.echo(plan_whole_video(model, policy, ranks, on, as_json, options))
        return
    planned = PlannedModel.open(model).override(**{name: options[name] for name in OVERRIDES})
    fp8 = {"fp8": options["weights"] != "full", "fp8_activations": options["weights"] == "fp8-dynamic"}
    work = dataclasses.replace(planned.workload(policy), **fp8, history=history, kept_chunks=kept_chunks)
    on = describe_machine(gpu, link, measured)
    if work.fp8_activations and on.fp8 == 1 and gpu != "cpu":
        raise ConfigError(f"--weights fp8-dynamic needs a GPU of compute capability 8.9 or above, not {gpu}")
    auxiliary = planned.auxiliary(work, offload, gpu == "cpu")
    sizes = possible_cfg_sizes(work.guided > 0, ranks)
    costs = cost.plan(work, ranks, on, cfg_sizes=sizes, auxiliary=auxiliary, sessions=sessions)
    decoding = planned.decoding(work, ranks, on)
    if plot is not None:
        plan_report.plot_plan(work, on, plot, auxiliary)
    if as_json:
        strategies, found = [plan_report.fields(c) for c in costs], plan_report.decoding_fields(decoding)
        click.echo(json.dumps({"strategies": strategies, "decoding": found, "assumed": planned.assumptions()}))
    else:
        plan_report.print_plan(work, costs, on)
        if decoding is not None:
            plan_report.print_decoding(decoding, ranks)
        if planned.assumed:
            click.echo(f"Assumed, because nothing says it: {', '.join(planned.assumptions())}.")


def describe_machine(gpu: str, link: str | None, measured: Path | None) -> Machine:
    """Describes a machine by the rates of data sheets, some of which measured ones may replace.

    Args:
        gpu: the name of a GPU.
        link: the name of the link between ranks; None for NVLink, or for the loopback of a machine without a GPU.
        measured: a JSON file with some fields of `Machine`, in SI units; None for data sheets alone.

    Returns:
        The machine.

    Raises:
        ConfigError: a name is unknown, the file cannot be read, or `Machine` has no such field.
    """
    from causalrope_sp.planning.machines import GPUS, LINKS, Machine, machine

    link = link or ("loopback" if gpu == "cpu" else "nvlink")
    for kind, name, known in (("gpu", gpu, GPUS), ("link", link, LINKS)):
        if name not in known:
            raise ConfigError(f"unknown {kind} {name!r}; there are: {', '.join(known)}; or give --measured rates")
    rates = machine(gpu, link)
    if measured is None:
        return rates
    try:
        found = read_object(measured)
        names = {field.name for field in dataclasses.fields(Machine)} - {"name"}
        if set(found) - {"name"} - names:
            raise ValueError(f"it must be an object with some of {', '.join(sorted(names))}")
        if not all(type(v) in (int, float) and 1e-12 < v < 1e30 for k, v in found.items() if k != "name"):
            raise ValueError("every rate must be a number above 0")
        return dataclasses.replace(rates, **{**found, "name": f"measured ({printable(measured.name)})"})
    except ValueError as reason:
        raise ConfigError(f"cannot use the measured rates in {measured}: {printable(reason)}") from reason
