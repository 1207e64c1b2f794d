"""toybox's chart: the one latent frame that starts every stream. It is committed to the cache and never decoded.

Rotary positions encode the distance between tokens, not where a token is in the picture. A large model infers that
from the picture's edges; toybox, which is trained for minutes, reads it from the chart, the sink of its window.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def waves(y: Tensor, x: Tensor, channels: int) -> Tensor:
    """Computes the chart's values at positions (y, x).

    The channels are y and x as ramps, then their sines and cosines of growing frequency, each of about unit size.

    Args:
        y: vertical positions as fractions of the picture, of any shape.
        x: horizontal positions, of the same shape.
        channels: how many values a position has.

    Returns:
        The values, (channels, *shape).
    """
    values = [3**0.5 * (2 * y - 1), 3**0.5 * (2 * x - 1)]
    for wave in range(-(-channels // 4)):
        for phase in (0, 0.25):
            values += [2**0.5 * torch.sin(2 * math.pi * (2**wave / 2 * position + phase)) for position in (y, x)]
    return torch.stack(values[:channels])


def chart(batch: int, channels: int, height: int, width: int) -> Tensor:
    """Returns the chart as a latent frame, (batch, 1, channels, height, width).

    Args:
        batch: how many equal copies.
        channels: latent channels.
        height: latent height.
        width: latent width.
    """
    y, x = torch.meshgrid(*((torch.arange(n, dtype=torch.float32) + 0.5) / n for n in (height, width)), indexing="ij")
    return waves(y, x, channels).expand(batch, 1, -1, -1, -1)
