"""Whether weights are numbers at all."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import torch
from torch import Tensor

from causalrope_sp.errors import CheckpointError
from causalrope_sp.weights.messages import some


def all_finite(tensor: Tensor) -> bool:
    """Whether none is NaN or infinite, by the least and the greatest: a mask takes memory, and 40 times as long."""
    return bool(torch.stack(tensor.aminmax()).isfinite().all())


def refuse_broken(path: Path, broken: Collection[str], dtype: torch.dtype) -> None:
    """Raises CheckpointError if any tensor is named: those that are not all finite in the dtype of the model."""
    if broken:
        name = str(dtype).removeprefix("torch.")
        raise CheckpointError(f"{path}: {len(broken)} NaN or infinite in {name}: {some(broken)}")
