"""Decoded pixels as pictures."""

from __future__ import annotations

import torch
from torch import Tensor


def to_uint8(pixels_BT3HW: Tensor) -> Tensor:
    """Pixels in [-1, 1] as uint8, of the same shape."""
    return (pixels_BT3HW.float() * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)
