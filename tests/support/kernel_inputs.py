"""Sizes and random numbers for the tests of torch kernels, and a rotation of a shard that begins inside a row."""

from __future__ import annotations

import torch
from torch import Tensor

from causalrope_kernels import Rotation

B, F, S, H, D, EPS = 2, 3, 4, 3, 8, 1e-6
T, WIDTH = F * S, H * D


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def a_rotation(width: int = D) -> Rotation:
    """Tokens [1, 1 + S) of a grid of 3×3, in frames far apart, keys elsewhere than queries."""
    spatial = width // 6
    time, row, column = (
        random(n, 2, pairs, seed=n) for n, pairs in ((60, width // 2 - 2 * spatial), (3, spatial), (3, spatial))
    )
    query_times, key_times = torch.tensor([50, 3, 4]), torch.tensor([0, 7, 0])
    return Rotation(time, row, column, query_times, key_times, start=1, tokens=S, columns=3)
