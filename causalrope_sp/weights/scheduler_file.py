"""The settings that the scheduler_config.json and the model_index.json of a diffusers folder say."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from causalrope_sp.checks import shown
from causalrope_sp.errors import CheckpointError
from causalrope_sp.weights.model_presets import Preset
from causalrope_sp.weights.weight_paths import read_json

_SPACED_OTHERWISE = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "shift_terminal")


def scheduler_settings(file: Path) -> dict[str, Any]:
    """Reads the settings of the sampler that a diffusers scheduler's file says.

    Args:
        file: the scheduler_config.json, which need not exist.

    Returns:
        Fields of `SamplerConfig`: `shift`, from `flow_shift` or FlowMatchEulerDiscreteScheduler's `shift`, unless the
        scheduler does not use the number; and `timestep_rule` "diffusers", which is what a pipeline of diffusers makes
        of a UniPCMultistepScheduler, unless the file asks for levels that are not spaced evenly.

    Raises:
        CheckpointError: the file cannot be read, or its shift is not a number.
    """
    scheduler = read_json(file) if file.is_file() else {}
    if scheduler.get("use_flow_sigmas") is False or scheduler.get("use_dynamic_shifting") is True:
        return {}
    settings: dict[str, Any] = {}
    flow_unipc = scheduler.get("_class_name") == "UniPCMultistepScheduler" and scheduler.get("use_flow_sigmas") is True
    if flow_unipc and not any(map(scheduler.get, _SPACED_OTHERWISE)):
        settings["timestep_rule"] = "diffusers"
    shift = scheduler.get("flow_shift", scheduler.get("shift"))
    if isinstance(shift, bool) or not isinstance(shift, int | float | None) or abs(shift or 0) > sys.float_info.max:
        raise CheckpointError(f"{file}: the shift must be a number, not {shown(shift)}")
    return settings if shift is None else {"shift": float(shift), **settings}


def with_scheduler(preset: Preset, file: Path) -> Preset:
    """Returns the preset with the settings of a diffusers scheduler in place of those that it assumes.

    Args:
        preset: the preset.
        file: the scheduler_config.json, which need not exist.

    Raises:
        CheckpointError: the file cannot be read, or its shift is not a number.
        ConfigError: its shift is out of range.
    """
    settings = scheduler_settings(file) if preset.assumed else {}
    if not settings:
        return preset
    values = ", ".join(f"{name} {value}" for name, value in settings.items())
    return replace(
        preset,
        sampler=replace(preset.sampler, **settings),
        evidence=(*preset.evidence, f"{file.parent.name}/{file.name} says {values}"),
        assumed=tuple(name for name in preset.assumed if name not in settings),
    )


def with_index(preset: Preset, file: Path) -> Preset:
    """Returns the preset with what the index of a diffusers folder says: whether an image is within the first chunk.

    Args:
        preset: the preset.
        file: the model_index.json, which need not exist.

    Raises:
        CheckpointError: the file cannot be read.
    """
    if preset.stream.image_in_chunk or not file.is_file() or read_json(file).get("expand_timesteps") is not True:
        return preset
    evidence = f"{file.name} says expand_timesteps, so that an image is in the first chunk, at timestep 0"
    stream = replace(preset.stream, image_in_chunk=True)
    return replace(preset, stream=stream, evidence=(*preset.evidence, evidence))
