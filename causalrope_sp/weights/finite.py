"""Checks that weights hold neither NaN nor infinity."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import torch
from torch import Tensor

from causalrope_sp.errors import CheckpointError
from causalrope_sp.weights.messages import some


def all_finite(tensor: Tensor) -> bool:
    """Returns whether no number of a tensor is NaN or infinite.

    It looks at the least and the greatest number: a mask of all of them takes memory, and 40 times as long.
    """
    return bool(torch.stack(tensor.aminmax()).isfinite().all())


def refuse_broken(path: Path, broken: Collection[str], dtype: torch.dtype) -> None:
    """Refuses a checkpoint in which tensors were found that hold NaN or infinity.

    Args:
        path: the checkpoint.
        broken: the stored names of those tensors.
        dtype: the dtype of the model, in which they are not finite.

    Raises:
        CheckpointError: `broken` is not empty.
    """
    if broken:
        name = str(dtype).removeprefix("torch.")
        raise CheckpointError(f"{path}: {len(broken)} NaN or infinite in {name}: {some(broken)}")
