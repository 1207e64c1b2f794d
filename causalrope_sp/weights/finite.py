"""Whether weights are numbers at all."""

from __future__ import annotations

import torch
from torch import Tensor


def all_finite(tensor: Tensor) -> bool:
    """Whether none is NaN or infinite, by the least and the greatest: a mask takes memory, and 40 times as long."""
    return bool(torch.stack(tensor.aminmax()).isfinite().all())
