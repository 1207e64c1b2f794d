"""What `causalrope-sp inspect` says: a checkpoint's report with the preset that it would run with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from causalrope_sp.pipeline.model_config import ModelConfig, find_model_config
from causalrope_sp.toybox import EMBEDDED
from causalrope_sp.weights import CheckpointReport, Preset, find_preset, inspect_checkpoint


def inspect(path: str, part: str | None, preset: str | None, changes: Mapping[str, Any]) -> CheckpointReport:
    """The report on a checkpoint, an embedded model or a recipe's DiT. Its preset is the named one, else the recipe's,
    else the guessed one, with `changes` made to its stream and sampler.

    Raises:
        CheckpointError: nothing there that can be read.
        ConfigError: no such preset, or changes that cannot work together.
    """
    named = None if preset is None else replace(find_preset(preset), evidence=("named by --preset",))
    model_config = _recipe(path)
    report = inspect_checkpoint(path if model_config is None else model_config.transformer, part=part)
    if model_config is not None:
        made = Preset(
            "recipe",
            model_config.stream,
            model_config.sampler,
            None,
            str(find_model_config(path)),
            ("it has a recipe",),
        )
        named = named or made
    return replace(report, preset=(named or report.preset).override(**changes))


def fields(report: CheckpointReport) -> dict[str, Any]:
    """The report as JSON can hold it."""
    preset = report.preset
    return {
        "path": str(report.path),
        "layout": report.layout,
        "why": report.why,
        "wrapping": asdict(report.wrapping),
        "config": asdict(report.config),
        "dtype": str(report.dtype).removeprefix("torch."),
        "parameters": report.parameters,
        "preset": preset.name,
        "evidence": list(preset.evidence),
        "source": preset.source,
        "stream": asdict(preset.stream),
        "sampler": asdict(preset.sampler),
        "missing": report.missing,
        "unexpected": report.unexpected,
        "misshapen": report.misshapen,
    }


def text(report: CheckpointReport) -> str:
    """The report in lines of a name and what it is."""
    said = fields(report) | {"wrapping": str(report.wrapping)}
    lines = []
    for name, value in said.items():
        for line in _readable(value):
            lines.append(f"{name:>12}  {line}")
            name = ""
    return "\n".join(lines)


def _recipe(path: str) -> ModelConfig | None:
    model_config = path.endswith(".json") and not path.endswith(".index.json")
    if path in EMBEDDED or model_config or (Path(path) / "pipeline.json").is_file():
        return ModelConfig.load(find_model_config(path))
    return None


def _readable(value: Any) -> list[str]:
    if isinstance(value, list):
        return [str(item) for item in value] or ["nothing"]
    if isinstance(value, dict):
        return [f"{key} = {item}" for key, item in value.items()]
    return [f"{value:,}" if isinstance(value, int) else str(value)]
