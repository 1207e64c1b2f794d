"""Latte's sinusoids of places and times. Pure functions.

The published model holds them in float32; so do these, or a float64 model would not be the same one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

PERIOD = 10000.0


def places(rows: int, columns: int, width: int, base: int, scale: int) -> Tensor:
    """Of every token of a frame, (rows·columns, width): the first half its column, the second its row, both
    interpolated to a grid of `base` tokens a side."""
    y, x = (torch.arange(n, dtype=torch.float32) / (n / base) / scale for n in (rows, columns))
    across, down = _waves(x, width // 2), _waves(y, width // 2)
    table = torch.cat([across.expand(rows, -1, -1), down.unsqueeze(1).expand(-1, columns, -1)], -1)
    return table.flatten(0, 1).float()


def times(frames: Sequence[int], width: int) -> Tensor:
    """Of frames by their number, (F, width)."""
    return _waves(torch.tensor(frames), width).float()


def timestep_waves(timesteps_F: Tensor, width: int) -> Tensor:
    """Cosines, then sines, of timesteps, in float32 all the way as they were trained, (F, width)."""
    exponents = -math.log(PERIOD) * torch.arange(width // 2, dtype=torch.float32, device=timesteps_F.device)
    angles = timesteps_F.float().unsqueeze(-1) * torch.exp(exponents / (width // 2))
    return torch.cat([angles.cos(), angles.sin()], -1)


def _waves(at_N: Tensor, width: int) -> Tensor:
    rates = 1 / PERIOD ** (torch.arange(width // 2, dtype=torch.float64) / (width / 2))
    angles = torch.outer(at_N.double(), rates)
    return torch.cat([angles.sin(), angles.cos()], -1)
