"""The report on a checkpoint that the user sees."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from causalrope_sp.config import DiTConfig
from causalrope_sp.weights.messages import problem
from causalrope_sp.weights.model_presets import Preset
from causalrope_sp.weights.other_families import what_is_missing
from causalrope_sp.weights.wrappings import Wrapping


@dataclass(frozen=True)
class CheckpointReport:
    """What a checkpoint is, how it is meant to run, and what keeps it from being loaded.

    Attributes:
        path: the checkpoint, as the caller named it.
        layout: the name of its key layout, "wan" or "diffusers".
        why: the key that shows which layout it is.
        wrapping: what training code left around the model's tensors.
        config: the configuration of the model.
        assumed: the fields of `config` that nothing in the checkpoint says, and that are those of published Wan models.
        dtype: the dtype of most of the model's numbers.
        dtypes: how many of the model's numbers have each dtype.
        wide_parameters: how many of them stay in float32 in a model of 16 bits (see `Layout.wide_modules`).
        preset: the settings that the model is meant to run with.
        missing: the keys that the model needs and the checkpoint lacks.
        unexpected: the keys that belong to no parameter of the model.
        misshapen: "KEY is SHAPE, expected SHAPE" for each key of a wrong shape.
        beside: models beside it that are not used, as texts.
        passed_by: what the file holds that is no weight, by name.
    """

    path: Path
    layout: str
    why: str
    wrapping: Wrapping
    config: DiTConfig
    assumed: tuple[str, ...]
    dtype: torch.dtype
    dtypes: Mapping[torch.dtype, int]
    wide_parameters: int
    preset: Preset
    missing: list[str]
    unexpected: list[str]
    misshapen: list[str] = field(default_factory=list)
    beside: tuple[str, ...] = ()
    passed_by: tuple[str, ...] = ()

    @property
    def parameters(self) -> int:
        """How many numbers the model has."""
        return sum(self.dtypes.values())

    @property
    def problem(self) -> str | None:
        """All problems in one line; None if the checkpoint can be loaded."""
        found = problem(self.missing, self.unexpected, self.misshapen)
        return None if found is None else "; ".join([*self.not_run, found])

    @property
    def not_run(self) -> list[str]:
        """What its model does and this library does not, as texts."""
        return what_is_missing(self.unexpected)


def most_common_dtype(sizes: Counter[torch.dtype]) -> torch.dtype:
    """Returns the dtype that most numbers have.

    Args:
        sizes: how many numbers there are of each dtype; not empty.
    """
    return sizes.most_common(1)[0][0]
