"""Conversion of decoded pixels to 8-bit pictures."""

from __future__ import annotations

import torch
from torch import Tensor


def to_uint8(pixels_BT3HW: Tensor) -> Tensor:
    """Converts pixels in [-1, 1] to uint8.

    Args:
        pixels_BT3HW: pixels of any floating-point dtype; values outside [-1, 1] are clamped.

    Returns:
        Pixels in [0, 255], of the same shape.
    """
    return (pixels_BT3HW.float() * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)
