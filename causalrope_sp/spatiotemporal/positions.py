"""Sinusoidal embeddings of positions. Pure functions.

Shapes: S = rows·columns tokens of a frame.
"""

from __future__ import annotations

import torch
from torch import Tensor

PERIOD = 10000.0


def spatial_positions(y_R: Tensor, x_C: Tensor, width: int) -> Tensor:
    """Embeds the position of every token of a frame.

    Args:
        y_R: the position of every row of tokens.
        x_C: the position of every column.
        width: numbers of an embedding, divisible by 4.

    Returns:
        (S, width) in float64; the first half embeds a token's column, the second half its row.
    """
    across, down = waves(x_C, width // 2), waves(y_R, width // 2)
    table = torch.cat([across.expand(len(y_R), -1, -1), down.unsqueeze(1).expand(-1, len(x_C), -1)], -1)
    return table.flatten(0, 1)


def waves(at_N: Tensor, width: int) -> Tensor:
    """Returns the sines, then the cosines, of positions, (N, width) in float64."""
    rates = 1 / PERIOD ** (torch.arange(width // 2, dtype=torch.float64) / (width / 2))
    angles = torch.outer(at_N.double(), rates)
    return torch.cat([angles.sin(), angles.cos()], -1)
