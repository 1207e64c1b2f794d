"""`causalrope-sp inspect`: reports the contents of a checkpoint and the preset with which it would run."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import click

from causalrope_sp.cli.inspect_other import other_file
from causalrope_sp.cli.model_options import CHUNK_FRAMES, SHIFT, SINK, WINDOW
from causalrope_sp.cli.options import complete_model, complete_preset, parse_steps
from causalrope_sp.cli.runtime import rank
from causalrope_sp.cli.whole_video import check_whole_video, inspect_whole_video
from causalrope_sp.config import stream_fields
from causalrope_sp.errors import CheckpointError, escaped_line, first_line
from causalrope_sp.spatiotemporal.kinds import kind_of

if TYPE_CHECKING:
    from causalrope_sp.weights import AdapterReport, CheckpointReport


@click.command()
@click.argument("path", shell_complete=complete_model)
@click.option(
    "--part", help="Inspect this model in the file: generator, generator_ema, ... The default is the averaged one."
)
@click.option(
    "--preset",
    shell_complete=complete_preset,
    help="Use the settings of this preset: self-forcing, causvid, longlive-1.3b, ... The default is inferred.",
)
@WINDOW
@SINK
@CHUNK_FRAMES
@click.option(
    "--steps",
    help="Use this many evenly spaced steps (4), or these timesteps (1000,750,...). The default is the preset's.",
)
@SHIFT
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object. The default is a text.")
def inspect(path: str, part: str | None, preset: str | None, steps: str | None, as_json: bool, **run: Any) -> int:
    """Reports the layout of the checkpoint at PATH, the evidence for it, missing tensors, its preset, and its VIN.

    Of a LoRA it reports the kind, whose names it has, ranks and scales; of a saved session, of embeddings, of a
    compressed video, of windows of heads and of a policy of reuse it says so in a sentence. The exit status is 1 if
    the file cannot be loaded as a model.
    """
    other = None if part is not None else other_file(path)
    if other is not None:
        if rank() == 0:
            click.echo(json.dumps({"path": path, "what": other}) if as_json else f"{path}: {other}")
        return 1
    whole_video = kind_of(path)
    if whole_video is not None:
        check_whole_video(whole_video, {})
        if rank() == 0:
            fields = inspect_whole_video(path, whole_video)
            click.echo(json.dumps(fields) if as_json else _as_text(fields, ()))
        return 0
    adapter = None if part is not None else _adapter(path)
    if adapter is not None:
        if rank() == 0:
            fields = adapter_fields(adapter)
            click.echo(json.dumps(fields) if as_json else _as_text(fields, ()))
        return 1 if adapter.unknown else 0
    changes = {name: value for name, value in (run | {"steps": parse_steps(steps)}).items() if value is not None}
    report = examine(path, part, preset, changes)
    vin = vin_fields(path, report)
    if rank() == 0:
        click.echo(json.dumps(_joined(report_fields(report), vin)) if as_json else report_text(report, vin))
    return 1 if report.problem or "problem" in vin.get("vin", {}) else 0


def examine(path: str, part: str | None, preset: str | None, changes: Mapping[str, Any]) -> CheckpointReport:
    """Inspects a checkpoint, an embedded model, or the transformer of a pipeline.json or a diffusers folder.

    Args:
        path: the path, or the name of an embedded model.
        part: which of several models in the file; None takes the averaged one.
        preset: the name of a preset; None takes the model's own settings, or else infers a preset.
        changes: fields of the preset's stream and sampler that are replaced; `steps` may be a number of steps.

    Returns:
        The report, with the preset.

    Raises:
        CheckpointError: the model cannot be read, or its pipeline.json names no text encoder or VAE.
        ConfigError: the preset does not exist, or the changes contradict each other.
    """
    from causalrope_sp.diffusion.schedule import timesteps
    from causalrope_sp.pipeline.model_source import MODEL_INDEX, SCHEDULER_FILE
    from causalrope_sp.weights import Preset, find_preset, inspect_checkpoint
    from causalrope_sp.weights.models_beside import refuse_experts
    from causalrope_sp.weights.scheduler_file import with_index, with_scheduler

    named = None if preset is None else replace(find_preset(preset), evidence=("named by --preset",))
    try:
        file = _pipeline_file(path)
        whole = (Path(path) / "model_index.json").is_file()
    except OSError as reason:
        raise CheckpointError(f"{path}: {first_line(reason)}") from reason
    if file is None:
        refuse_experts(Path(path))
        transformer = Path(path) / "transformer" if whole else Path(path)
        report = inspect_checkpoint(transformer, part=part)
        own = with_index(report.preset, Path(path) / MODEL_INDEX)
        chosen = named or with_scheduler(own, Path(path) / SCHEDULER_FILE)
    else:
        from causalrope_sp.pipeline.load_options import LoadOptions
        from causalrope_sp.pipeline.model_source import find_model

        config = find_model(path, LoadOptions())
        report = inspect_checkpoint(config.transformer, part=part)
        evidence = ("it has a pipeline.json", *config.inferred)
        chosen = named or Preset("own", config.stream, config.sampler, None, str(file), evidence)
    if "steps" in changes:
        spaced = timesteps(changes["steps"], chosen.sampler.solver, chosen.sampler.timestep_rule)
        changes = {**changes, "steps": spaced}
    return replace(report, preset=chosen.override(**changes))


def report_fields(report: CheckpointReport) -> dict[str, Any]:
    """Returns the report as values that JSON can represent; `timesteps` are those of the sampler after its shift."""
    from causalrope_sp.diffusion.schedule import model_timesteps

    preset = report.preset
    return {
        "path": str(report.path),
        "layout": report.layout,
        "why": report.why,
        "wrapping": asdict(report.wrapping),
        "config": asdict(report.config),
        "assumed": [*report.assumed, *preset.assumed],
        "dtype": str(report.dtype).removeprefix("torch."),
        "dtypes": {str(dtype).removeprefix("torch."): count for dtype, count in report.dtypes.items()},
        "parameters": report.parameters,
        "preset": preset.name,
        "evidence": list(preset.evidence),
        "source": preset.source,
        "stream": stream_fields(preset.stream),
        "sampler": asdict(preset.sampler),
        "timesteps": tuple(round(timestep, 1) for timestep in model_timesteps(preset.sampler)),
        "not_run": report.not_run,
        "missing": report.missing,
        "unexpected": report.unexpected,
        "misshapen": report.misshapen,
        "beside": list(report.beside),
        "passed_by": list(report.passed_by),
    }


def vin_fields(path: str, report: CheckpointReport) -> dict[str, Any]:
    """Reports on the Video Interface Network of a model, as values that JSON can represent.

    Args:
        path: the path of the model, or the name of an embedded one.
        report: the report on its transformer.

    Returns:
        One field, `vin`: its file, the number of its parameters, its sizes and the settings of its parallel chunks, or
        the problem that keeps it from being loaded. No field, if the model names no VIN.
    """
    from causalrope_sp.pipeline.load_options import LoadOptions
    from causalrope_sp.pipeline.model_source import find_model
    from causalrope_sp.vin import inspect_vin

    file = None if _pipeline_file(path) is None else find_model(path, LoadOptions()).vin
    if file is None:
        return {}
    try:
        network, chunks = inspect_vin(file, report.config)
    except CheckpointError as problem:
        return {"vin": {"path": str(file), "problem": str(problem)}}
    parameters = sum(parameter.numel() for parameter in network.parameters())
    sizes = asdict(network.config) | asdict(chunks)
    return {"vin": {"path": str(file), "parameters": parameters, **sizes}}


def report_text(report: CheckpointReport, vin: Mapping[str, Any] = MappingProxyType({})) -> str:
    """Returns the report, with what `vin_fields` returned, as lines with a name and a value each; a value that is
    assumed says so."""
    fields = _joined(report_fields(report) | {"wrapping": str(report.wrapping)}, vin)
    assumed = fields.pop("assumed")
    return _as_text(fields, assumed)


def _joined(fields: Mapping[str, Any], vin: Mapping[str, Any]) -> dict[str, Any]:
    """Adds the field of a VIN, whose model makes no stream, to the report on its transformer."""
    return {name: value for name, value in fields.items() if not vin or name != "stream"} | dict(vin)


def adapter_fields(report: AdapterReport) -> dict[str, Any]:
    """Returns the report on an adapter as values that JSON can represent."""
    return {
        "path": str(report.path),
        "adapter": report.kinds,
        "names": list(report.writers),
        "ranks": list(report.ranks),
        "scales": [
            {"scale": scale, "alpha": source, "modules": count} for (scale, source), count in report.scales.items()
        ],
        "unknown": list(report.unknown),
    }


def _adapter(path: str) -> AdapterReport | None:
    """The report on an adapter; None if there is no file or folder of weights at the path, or it is no adapter."""
    from causalrope_sp.toybox import EMBEDDED
    from causalrope_sp.weights import inspect_adapter

    try:
        whole = path in EMBEDDED or path.endswith(".json") or (Path(path) / "model_index.json").is_file()
        if whole or (Path(path) / "pipeline.json").is_file():
            return None
    except OSError as reason:
        raise CheckpointError(f"{path}: {first_line(reason)}") from reason
    return inspect_adapter(path)


def _as_text(fields: Mapping[str, Any], assumed: Collection[str]) -> str:
    """Lines with a name and a value each."""
    lines = []
    for name, value in fields.items():
        for line in _readable(value, assumed):
            lines.append(f"{name:>12}  {escaped_line(line)}")
            name = ""
    return "\n".join(lines)


def _pipeline_file(path: str) -> Path | None:
    """The pipeline.json of a name or a path, if there is one."""
    from causalrope_sp.toybox import EMBEDDED, WEIGHTS

    if path in EMBEDDED:
        return WEIGHTS / f"{path}.json"
    if path.endswith(".json") and not path.endswith(".index.json"):
        return Path(path)
    inside = Path(path) / "pipeline.json"
    return inside if inside.is_file() else None


def _readable(value: Any, assumed: Collection[str]) -> list[str]:
    """The lines that show a value; `assumed` are the keys of its fields that are no facts."""
    if isinstance(value, list):
        return [str(item) for item in value] or ["nothing"]
    if isinstance(value, dict):
        return [f"{key} = {item}{' (assumed)' if key in assumed else ''}" for key, item in value.items()]
    return [f"{value:,}" if isinstance(value, int) else str(value)]
