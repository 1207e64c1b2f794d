"""Decoded pixels as pictures."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def to_uint8(pixels_BT3HW: Tensor) -> np.ndarray:
    """Pixels in [-1, 1] as uint8 (B, T, H, W, 3)."""
    scaled = (pixels_BT3HW.float() * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)
    return scaled.movedim(2, -1).cpu().numpy()
