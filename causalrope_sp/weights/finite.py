"""Checks that weights hold neither NaN nor infinity."""

from __future__ import annotations

from collections.abc import Collection
from math import isfinite
from pathlib import Path

import torch
from torch import Tensor

from causalrope_sp.errors import CheckpointError
from causalrope_sp.weights.messages import some

BLOCK = 1 << 19  # numbers that are copied at once, so that they fit into a processor's cache


def all_finite(tensor: Tensor) -> bool:
    """Returns whether no number of a tensor is NaN or infinite.

    A sum with a number that is not finite is not finite either. Where the sum is not, for such a number or because
    it overflows, the least and the greatest number decide. A mask of all numbers takes memory, and 40 times as long.
    """
    return isfinite(tensor.sum().item()) or bool(torch.stack(tensor.aminmax()).isfinite().all())


def copy_finite(to: Tensor, x: Tensor) -> bool:
    """Copies a tensor into another one, which is contiguous and has as many numbers.

    On a CPU it goes block by block, so that numbers are checked while they are in the processor's cache.

    Args:
        to: what is written, of any dtype.
        x: what is read.

    Returns:
        Whether no number of `to` is NaN or infinite now.
    """
    if to.device.type != "cpu":
        return all_finite(to.copy_(x))
    total = 0.0
    for target, part in zip(to.view(-1).split(BLOCK), x.reshape(-1).split(BLOCK), strict=True):
        total += target.copy_(part).sum().item()
    return isfinite(total) or all_finite(to)


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
