"""The size of a call's frames, and how they are denoised."""

from __future__ import annotations

from dataclasses import dataclass

from causalrope_sp.config import SamplerConfig
from causalrope_sp.grid import LatentGrid


@dataclass(frozen=True)
class StreamSettings:
    """The size of a call's frames and how they are denoised.

    Args:
        height: pixels of a frame.
        width: pixels of a frame.
        grid: the size of its latent in tokens.
        sampler: steps, solver and guidance.
    """

    height: int
    width: int
    grid: LatentGrid
    sampler: SamplerConfig
