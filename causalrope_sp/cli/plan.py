"""`causalrope-sp plan`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import click


@click.command()
@click.option("--model", default="wan2.1-1.3b", show_default=True, help="wan2.1-1.3b, wan2.1-14b, toybox or a PATH.")
@click.option("--height", type=int, help="Pixels (default: the model's).")
@click.option("--width", type=int, help="Pixels.")
@click.option("--window", type=int, help="Latent frames that attention looks back over.")
@click.option("--sink", type=int, help="Latent frames of the very start that stay.")
@click.option("--chunk-frames", type=int, help="Latent frames denoised together.")
@click.option("--steps", type=int, help="Denoise passes a chunk.")
@click.option("--guidance", type=float, help="The scale; any but 1 makes a second branch.")
@click.option("--guidance-interval", type=(float, float), help="Timesteps within which steps are guided.")
@click.option("--reuse", help="Attention reused between steps: pab:PRESET, such as pab:latte, or a FILE.")
@click.option("--ranks", default=8, show_default=True, type=click.IntRange(1, 4096))
@click.option("--gpu", default="h100", show_default=True, help="Of each rank: h200, h100, a800, a100, l40s, ...")
@click.option("--link", default="nvlink", show_default=True, help="Between ranks: nvlink, pcie, infiniband, ...")
@click.option("--weights", type=click.Choice(["full", "fp8"]), default="full", show_default=True, help="Of the DiT.")
@click.option(
    "--offload",
    multiple=True,
    default=["text"],
    show_default=True,
    metavar="text|codec|none",
    help="What is on the device only while it is used.",
)
@click.option("--measured", type=click.Path(path_type=Path), help="A JSON file of rates that were measured.")
@click.option("--plot", type=click.Path(path_type=Path), help="Draws fps and memory over 1 to 64 ranks into this file.")
@click.option("--json", "as_json", is_flag=True, help="One object: strategies, a list, and decoding.")
def plan(
    model: str,
    height: int | None,
    width: int | None,
    window: int | None,
    sink: int | None,
    chunk_frames: int | None,
    steps: int | None,
    guidance: float | None,
    guidance_interval: tuple[float, float] | None,
    reuse: str | None,
    ranks: int,
    gpu: str,
    link: str,
    weights: str,
    offload: tuple[str, ...],
    measured: Path | None,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Predicts, for every strategy, memory, bytes and time of a stream on RANKS ranks; nothing is run."""
    from causalrope_sp.cli import planning
    from causalrope_sp.distributed.mesh import possible_cfg_sizes
    from causalrope_sp.pipeline.offload import Offload
    from causalrope_sp.planning import cost
    from causalrope_sp.reuse import find_policy

    policy = None if reuse is None else find_policy(reuse)
    work = planning.describe_workload(
        model, height, width, window, sink, chunk_frames, steps, guidance, guidance_interval, policy
    )
    work = replace(work, fp8=weights == "fp8")
    on = planning.describe_machine(gpu, link, measured)
    auxiliary = planning.describe_auxiliary(model, work, Offload.of(offload), gpu == "cpu")
    costs = cost.plan(work, ranks, on, cfg_sizes=possible_cfg_sizes(work.guided > 0, ranks), auxiliary=auxiliary)
    decoding = planning.describe_decoding(model, work, ranks, on)
    if plot is not None:
        planning.plot_plan(work, on, plot)
    if as_json:
        found = {"strategies": [planning.fields(c) for c in costs], "decoding": planning.decoding_fields(decoding)}
        click.echo(json.dumps(found))
    else:
        planning.print_plan(work, costs, on)
        if decoding is not None:
            planning.print_decoding(decoding, ranks)
