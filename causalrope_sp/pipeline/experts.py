"""The two experts in a model's folder, as fields of its configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from causalrope_sp.errors import CheckpointError
from causalrope_sp.weights import inspect_checkpoint
from causalrope_sp.weights.models_beside import find_experts


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
