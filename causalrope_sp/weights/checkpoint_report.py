"""What a checkpoint is, as it is told to the user."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch

from causalrope_sp.config import DiTConfig
from causalrope_sp.weights.messages import problem
from causalrope_sp.weights.model_presets import Preset
from causalrope_sp.weights.wrappings import Wrapping


@dataclass(frozen=True)
class CheckpointReport:
    """What a checkpoint is, why that is thought, how it is meant to run, and what keeps it from being loaded."""

    path: Path
    layout: str
    why: str
    wrapping: Wrapping
    config: DiTConfig
    dtype: torch.dtype
    parameters: int
    preset: Preset
    missing: list[str]
    unexpected: list[str]
    misshapen: list[str] = field(default_factory=list)  # "key is (expected) there (given)"

    @property
    def problem(self) -> str | None:
        """All that is wrong, in one line; None if the checkpoint can be loaded."""
        return problem(self.missing, self.unexpected, self.misshapen)


def most_common_dtype(sizes: Counter[torch.dtype]) -> torch.dtype:
    """The dtype of most of the numbers."""
    return sizes.most_common(1)[0][0]
