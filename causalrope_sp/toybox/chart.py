"""toybox's chart: the one latent frame that every stream opens with, committed like any given frame, never decoded.

Rotary positions tell a token how far others are, never where it stands itself. A large model learns the edges of the
picture from what it sees; toybox, trained for minutes, is told. The chart stays in sight as the window's sink.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def waves(y: Tensor, x: Tensor, channels: int) -> Tensor:
    """What the chart holds at places (y, x), fractions of the picture of any one shape: (channels, *shape).

    y and x as ramps, then as sines and cosines of growing frequency, in turn, as far as the channels go, each of about
    unit size.
    """
    values = [3**0.5 * (2 * y - 1), 3**0.5 * (2 * x - 1)]
    for wave in range(-(-channels // 4)):
        for phase in (0, 0.25):
            values += [2**0.5 * torch.sin(2 * math.pi * (2**wave / 2 * place + phase)) for place in (y, x)]
    return torch.stack(values[:channels])


def chart(batch: int, channels: int, height: int, width: int) -> Tensor:
    """(batch, 1, channels, height, width): every place's own waves."""
    y, x = torch.meshgrid(*((torch.arange(n) + 0.5) / n for n in (height, width)), indexing="ij")
    return waves(y, x, channels).expand(batch, 1, -1, -1, -1)
