"""The two experts in a model's folder, as fields of its configuration, and the LoRAs of each."""

from __future__ import annotations

import re
from collections.abc import Iterable
from os import PathLike
from pathlib import Path
from typing import Any

from causalrope_sp.errors import CheckpointError, ConfigError
from causalrope_sp.weights import inspect_checkpoint
from causalrope_sp.weights.lora import EXPERTS, Expert, Lora
from causalrope_sp.weights.models_beside import find_experts

# as LightX2V's high_noise_model.safetensors and Kijai's ..._lora_HIGH_fp16.safetensors
_NOISE = re.compile(r"(?P<noise>(?i:high|low))(?=(?i:[ _-]?noise))|(?<![A-Za-z])(?P<word>HIGH|LOW)(?![A-Za-z])")


def experts_in(folder: Path, index: Path, inferred: list[str]) -> dict[str, Any]:
    """Returns the fields of `ModelConfig` of two experts in a folder; none if there are not two.

    Args:
        folder: the folder of the model.
        index: its model_index.json, which need not exist.
        inferred: takes a text on what was inferred.

    Raises:
        CheckpointError: nothing says at which noise level they take turns, or they are of different sizes.
    """
    experts = find_experts(folder, index)
    if experts is None:
        return {}
    sizes = [inspect_checkpoint(path).config for path in (experts.high_noise, experts.low_noise)]
    if sizes[0] != sizes[1]:
        raise CheckpointError(f"{experts.high_noise} and {experts.low_noise} are models of different sizes")
    boundary = f"{1000 * experts.boundary_ratio:g}"
    inferred.append(
        f"{experts.low_noise.name} makes the steps below timestep {boundary} ({experts.evidence}); each of the two "
        "models has a cache of its own"
    )
    return {
        "transformer": experts.high_noise,
        "transformer_2": experts.low_noise,
        "boundary_ratio": experts.boundary_ratio,
    }


def loras_of_models(loras: Iterable[str | PathLike[str] | Lora], models: int) -> list[list[Lora]]:
    """Returns the LoRAs of each transformer, in order.

    Args:
        loras: the LoRAs. Which of two transformers one is of is said by its `expert`, or by the name of its file or of
            the folder that this is in, which says high or low noise, or HIGH or LOW.
        models: how many transformers there are, 1 or 2.

    Raises:
        ConfigError: nothing says it, or an expert is named and there is one transformer.
    """
    by_model: list[list[Lora]] = [[] for _ in range(models)]
    for lora in map(Lora.of, loras):
        expert = lora.expert or (_named_expert(Path(lora.path)) if models > 1 else None)
        if lora.expert is not None and models == 1:
            raise ConfigError(f"the LoRA {lora} names an expert, and the model has one transformer")
        if expert is None and models > 1:
            raise ConfigError(
                f"the LoRA {lora} must say of which of the two transformers it is, since its name does not: "
                f"{' or '.join(f'FILE:{name}' for name in EXPERTS)}"
            )
        by_model[0 if expert is None else EXPERTS.index(expert)].append(lora)
    return by_model


def _named_expert(path: Path) -> Expert | None:
    """The expert of a LoRA by the name of its file, else of its folder; None if they name none or both."""
    for name in (path.name, path.parent.name):
        named = {(match["noise"] or match["word"]).lower() for match in _NOISE.finditer(name)}
        if len(named) == 1:
            return EXPERTS[("high", "low").index(named.pop())]
    return None
