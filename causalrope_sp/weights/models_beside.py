"""Models that lie beside one another and make a video together: Wan 2.2's two experts.

Wan 2.2's A14B models denoise noisy latents by one transformer and clean ones by another. diffusers has them in
`transformer/` and `transformer_2/`, Wan's own folder in `high_noise_model/` and `low_noise_model/`, and ComfyUI in two
files whose names say high or low noise.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from causalrope_sp.checks import shown
from causalrope_sp.errors import CheckpointError
from causalrope_sp.io.json_files import read_object
from causalrope_sp.weights.messages import one_line

EXPERTS = (("transformer", "transformer_2"), ("high_noise_model", "low_noise_model"))
_BOUNDARIES = {"t2v": 0.875, "i2v": 0.9}  # wan/configs/wan_t2v_A14B.py and wan_i2v_A14B.py of Wan-Video/Wan2.2
_NOISE = re.compile(r"(high|low)(?=[ _-]?noise)", re.IGNORECASE)
_OTHER = {"high": "low", "low": "high"}


@dataclass(frozen=True)
class Experts:
    """Two models that share the denoising steps by noise level.

    Attributes:
        high_noise: the folder of the model of the steps at high noise.
        low_noise: the folder of the other one.
        boundary_ratio: the timestep, divided by 1000, below which the second one makes the steps.
        evidence: what says the boundary.
    """

    high_noise: Path
    low_noise: Path
    boundary_ratio: float
    evidence: str


def find_experts(folder: Path, index: Path) -> Experts | None:
    """Returns the two experts in a folder of diffusers' or Wan's own layout; None if there are not two.

    Args:
        folder: the folder.
        index: its model_index.json, which need not exist.

    Raises:
        CheckpointError: nothing says at which noise level they take turns, or a file cannot be read.
    """
    pair = next((pair for pair in EXPERTS if all((folder / name).is_dir() for name in pair)), None)
    if pair is None:
        return None
    high, low = (folder / name for name in pair)
    ratio = _read(index).get("boundary_ratio") if index.is_file() else None
    evidence = f"{index.name} says boundary_ratio {ratio}"
    if ratio is None:
        own = high / "config.json"
        kind = _read(own).get("model_type") if own.is_file() and pair == EXPERTS[1] else None
        ratio = _BOUNDARIES.get(kind) if isinstance(kind, str) else None
        evidence = f"boundary_ratio {ratio} is that of Wan 2.2's {kind} models"
    if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 < ratio < 1:
        raise CheckpointError(
            f"{folder}: holds two experts by noise level, {pair[0]}/ and {pair[1]}/, whose boundary_ratio must be a "
            f"number in (0, 1) in model_index.json or a pipeline.json, not {shown(ratio)}"
        )
    return Experts(high, low, float(ratio), evidence)


def _read(file: Path) -> dict[str, Any]:
    try:
        return read_object(file)
    except ValueError as error:
        raise CheckpointError(f"{file}: {one_line(error)}") from error


def refuse_experts(folder: Path) -> None:
    """Refuses a folder that holds two experts where one model is asked for.

    Raises:
        CheckpointError: it does; the message names both.
    """
    for pair in EXPERTS:
        if all((folder / name).is_dir() for name in pair):
            first, second = pair
            raise CheckpointError(
                f"{folder}: holds two models, {first}/ and {second}/ (two experts by noise level, as Wan 2.2's A14B), "
                f"which a pipeline runs together; one of them makes other videos: name it as {folder / first}"
            )


def parts_left_out(index: Path, known: Collection[str]) -> list[str]:
    """Returns the parts in a diffusers folder that are not run, as texts.

    Args:
        index: its model_index.json.
        known: the parts that are read.

    Raises:
        CheckpointError: the video depends on one of them: a further transformer, or another encoder.
    """
    content = _read(index)
    parts = [
        name
        for name, kind in content.items()
        if isinstance(kind, list) and any(kind) and name not in known and not name.startswith("_")
    ]
    needed = [name for name in parts if "transformer" in name or "encoder" in name]
    if needed:
        raise CheckpointError(
            f"{index} has {' and '.join(needed)}, which this version does not run; it runs the transformer alone, and "
            "that would make another video"
        )
    return [f"{name} is not used" for name in parts]


def models_beside(path: Path) -> tuple[str, ...]:
    """Returns the other expert of a model that was named itself, as text; empty if it is no expert by its name.

    Args:
        path: the file or folder of the model.
    """
    name = path.name
    for pair in EXPERTS:
        other = next((b for a, b in (pair, pair[::-1]) if a == name), None)
        if other is not None and (path.parent / other).is_dir():
            return (f"{other}/ beside it: the other expert by noise level, not used",)
    partner = _NOISE.sub(lambda match: _matching_case(match[0]), name)
    if partner == name:
        return ()
    there = "beside it" if (path.parent / partner).exists() else "not beside it"
    return (f"{partner}, {there}: its name says that it is one of two experts by noise level; the other is not used",)


def _matching_case(word: str) -> str:
    other = _OTHER[word.lower()]
    return other.upper() if word.isupper() else other.capitalize() if word[0].isupper() else other
