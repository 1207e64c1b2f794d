"""`causalrope-sp bench`: measures a model on this machine and prints what people paste into reports."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from causalrope_sp.cli.generate import generate
from causalrope_sp.cli.model_options import check_uncontrolled
from causalrope_sp.cli.numbers import IntRange
from causalrope_sp.cli.options import parse_steps
from causalrope_sp.cli.runtime import rank, set_up_logging
from causalrope_sp.errors import ConfigError

if TYPE_CHECKING:
    from causalrope_sp.pipeline.pipeline import CausalVideoPipeline
    from causalrope_sp.profiling.bench import Row

LOADING = (  # of `LoadOptions`
    *("base", "dtype", "weights", "height", "width", "window", "similar_frames", "cache"),
    *("heads", "num_inference_steps", "graphs"),
)
OF_GENERATE = {*LOADING, "model", "device", "num_frames", "steps", "strategy", "attention"}


@click.command(params=[option for option in generate.params if option.name in OF_GENERATE])
@click.argument("prompt", required=False)
@click.option(
    "--runs",
    type=IntRange(1),
    default=3,
    show_default=True,
    help="Make this many warm videos, and report the median of the times.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one line of JSON. The default is a table.")
def bench(
    prompt: str | None,
    model: str,
    device: str | None,
    num_frames: int,
    strategy: str,
    attention: str,
    runs: int,
    as_json: bool,
    **options: Any,
) -> None:
    """Measures a model on this machine: loading, first frames, denoising, decoding and a whole video.

    Without PROMPT the text embeddings are zeros and no text is encoded. The floor of a row is the time that its
    arithmetic alone takes at the rate of large matrix products, which is measured too.
    """
    from causalrope_sp.checks import check_whole

    check_whole("--frames", num_frames)
    options["num_inference_steps"] = parse_steps(options.pop("steps"))
    set_up_logging(silent=as_json)
    from causalrope_sp.distributed import SequenceParallel
    from causalrope_sp.pipeline.load_options import LoadOptions
    from causalrope_sp.pipeline.model_source import find_model
    from causalrope_sp.profiling import bench as measuring
    from causalrope_sp.profiling.environment import machine_fields, version_fields

    loading = LoadOptions(**options)
    if find_model(model, loading).vin is not None:
        raise ConfigError(f"{model} makes its chunks in parallel, and bench measures streams: name another model")
    parallel = SequenceParallel.from_env(strategy, device, attention=attention)
    pipe, loaded = measuring.load(model, loading, parallel)
    check_uncontrolled(model, pipe)
    rates = {dtype: measuring.matrix_rate(parallel.device, dtype) for dtype in {pipe.model.dtype, pipe.codec.dtype}}
    rows = [loaded, *measuring.measure(pipe, prompt, num_frames, runs, rates)]
    parallel.close()
    if rank() != 0:
        return
    report = {
        "machine": machine_fields(parallel.device),
        "versions": version_fields(),
        "run": _run_fields(pipe, model, num_frames, runs),
        "matrix_flops_per_s": {_name(dtype): rate for dtype, rate in rates.items()},
        "rows": [_row_fields(row) for row in rows],
    }
    if as_json:
        click.echo(json.dumps(report))
    else:
        _print_report(report)


def _run_fields(pipe: CausalVideoPipeline, model: str, frames: int, runs: int) -> dict[str, Any]:
    """What was run, in the form of JSON."""
    parts, stream = pipe.parts, pipe.config.stream
    return {
        "model": model,
        "ranks": pipe.parallel.size,
        "strategy": pipe.strategy,
        "attention": pipe.parallel.attention,
        "graphs": parts.options.graphs,
        "dtype": _name(pipe.model.dtype),
        "weights": pipe.config.weights,
        "codec": pipe.codec.name,
        "codec_dtype": _name(pipe.codec.dtype),
        "height": pipe.height,
        "width": pipe.width,
        "window": stream.window,
        "similar_frames": stream.similar_frames,
        "cache": stream.cache,
        "shortened_heads": None if stream.heads is None else stream.heads.shortened,
        "chunk_frames": stream.chunk_frames,
        "steps": len(pipe.config.sampler.steps),
        "frames": frames,
        "runs": runs,
    }


def _name(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")


def _row_fields(row: Row) -> dict[str, Any]:
    floor = None if row.floor is None else _rounded(row.floor)
    return {"name": row.name, "value": _rounded(row.value), "unit": row.unit, "floor": floor}


def _rounded(value: float) -> float:
    """The value with four digits."""
    return float(f"{value:.4g}")


def _print_report(report: dict[str, Any]) -> None:
    """Prints the report as text."""
    machine = dict(report["machine"])
    machine["memory_bytes"] = f"{machine['memory_bytes'] / 1e9:.1f} GB"
    described = {
        "machine": {name.removesuffix("_bytes"): value for name, value in machine.items()},
        "versions": report["versions"],
        "run": report["run"],
        "matrices": {dtype: f"{rate / 1e12:.3g} TFLOP/s" for dtype, rate in report["matrix_flops_per_s"].items()},
    }
    for title, values in described.items():
        click.echo(f"{title}: " + ", ".join(f"{name} {value}" for name, value in values.items() if value is not None))
    click.echo(f"\n{'':20}{'measured':>10}{'floor':>10}")
    for row in report["rows"]:
        floor = "–" if row["floor"] is None else f"{row['floor']:g}"
        click.echo(f"{row['name']:20}{row['value']:10g}{floor:>10} {row['unit']}")
