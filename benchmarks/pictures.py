"""The distance of two videos, uint8 (T, H, W, 3): PSNR and SSIM."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import conv2d

TAPS, SPREAD = 11, 1.5  # the window of SSIM, as published (Wang et al. 2004)


def psnr(video: np.ndarray, other: np.ndarray) -> float:
    """Returns the peak signal-to-noise ratio in dB, over all frames; infinity for equal videos."""
    error = np.mean((video.astype(np.float64) - other.astype(np.float64)) ** 2)
    return math.inf if error == 0 else float(10 * math.log10(255**2 / error))


def ssim(video: np.ndarray, other: np.ndarray) -> float:
    """Returns the structural similarity (Wang et al. 2004), as the mean over frames, channels and all positions of the
    window inside the frame; 1 for equal videos."""
    x, y = (torch.from_numpy(v).double().movedim(-1, 1).flatten(0, 1).unsqueeze(1) for v in (video, other))
    mean_x, mean_y = _blur(x), _blur(y)
    var_x, var_y = _blur(x * x) - mean_x**2, _blur(y * y) - mean_y**2
    both = _blur(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    light = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    return float((light * (2 * both + c2) / (var_x + var_y + c2)).mean())


def _blur(x_N1HW: Tensor) -> Tensor:
    at = torch.arange(TAPS, dtype=torch.float64) - TAPS // 2
    taps = torch.exp(-(at**2) / (2 * SPREAD**2))
    taps = taps / taps.sum()
    return conv2d(conv2d(x_N1HW, taps.view(1, 1, -1, 1)), taps.view(1, 1, 1, -1))
