"""Latte's sinusoidal embeddings of positions, frames and timesteps. Pure functions.

The published model holds them in float32. These functions do too, so that a float64 model has the same embeddings.

Shapes: S = rows·columns tokens of a frame, F frames or timesteps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

PERIOD = 10000.0


def spatial_positions(rows: int, columns: int, width: int, base: int, scale: int) -> Tensor:
    """Embeds the position of every token of a frame.

    Args:
        rows: rows of tokens.
        columns: columns of tokens.
        width: numbers of an embedding, divisible by 4.
        base: tokens per side of the grid that the model was trained at, which rows and columns are interpolated to.
        scale: divisor of all positions.

    Returns:
        (S, width) in float32; the first half embeds a token's column, the second half its row.
    """
    y, x = (torch.arange(n, dtype=torch.float32) / (n / base) / scale for n in (rows, columns))
    across, down = _waves(x, width // 2), _waves(y, width // 2)
    table = torch.cat([across.expand(rows, -1, -1), down.unsqueeze(1).expand(-1, columns, -1)], -1)
    return table.flatten(0, 1).float()


def times(frames: Sequence[int], width: int) -> Tensor:
    """Embeds frames by their global time index.

    Args:
        frames: the time index of each frame.
        width: numbers of an embedding, divisible by 2.

    Returns:
        (F, width) in float32.
    """
    return _waves(torch.tensor(frames), width).float()


def timestep_waves(timesteps_F: Tensor, width: int) -> Tensor:
    """Embeds timesteps, in float32 throughout, as the model was trained.

    Args:
        timesteps_F: the timesteps.
        width: numbers of an embedding, divisible by 2.

    Returns:
        (F, width): the cosines, then the sines.
    """
    exponents = -math.log(PERIOD) * torch.arange(width // 2, dtype=torch.float32, device=timesteps_F.device)
    angles = timesteps_F.float().unsqueeze(-1) * torch.exp(exponents / (width // 2))
    return torch.cat([angles.cos(), angles.sin()], -1)


def _waves(at_N: Tensor, width: int) -> Tensor:
    """Returns the sines, then the cosines, of positions, (N, width) in float64."""
    rates = 1 / PERIOD ** (torch.arange(width // 2, dtype=torch.float64) / (width / 2))
    angles = torch.outer(at_N.double(), rates)
    return torch.cat([angles.sin(), angles.cos()], -1)
