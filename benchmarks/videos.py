"""Whole videos as uint8 frames, for benchmarks on one rank."""

from __future__ import annotations

from typing import Any

import numpy as np

from causalrope_sp import CausalVideoPipeline


def video_of(pipe: CausalVideoPipeline, prompt: str | None = None, **options: Any) -> np.ndarray:
    """uint8 (T, H, W, 3)."""
    return np.concatenate([chunk.frames for chunk in pipe.stream(prompt, **options) if chunk.frames is not None])
