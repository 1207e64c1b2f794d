"""toybox's chart: the one latent frame that every stream opens with, committed like any given frame, never decoded.

Rotary positions tell a token how far others are, never where it stands itself. A large model learns the edges of the
picture from what it sees; toybox, trained for minutes, is told.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def chart(batch: int, channels: int, height: int, width: int) -> Tensor:
    """(batch, 1, channels, height, width), of about unit size.

    y and x as ramps, then as sines and cosines of growing frequency, in turn, as far as the channels go.
    """
    y, x = torch.meshgrid(*((torch.arange(n) + 0.5) / n for n in (height, width)), indexing="ij")
    waves = [3**0.5 * (2 * y - 1), 3**0.5 * (2 * x - 1)]
    for wave in range(-(-channels // 4)):
        for phase in (0, 0.25):
            waves += [2**0.5 * torch.sin(2 * math.pi * (2**wave / 2 * place + phase)) for place in (y, x)]
    return torch.stack(waves[:channels]).expand(batch, 1, -1, -1, -1)
