"""Whole videos of a pipeline, as the uint8 frames that its stream yields."""

from __future__ import annotations

from typing import Any

import numpy as np

from causalrope_sp import CausalVideoPipeline


def video_of(pipe: CausalVideoPipeline, prompt: str | None = None, **options: Any) -> Any:
    """uint8 (T, H, W, 3) on rank 0, None on the others."""
    made = [chunk.frames for chunk in pipe.stream(prompt, **options)]
    return None if pipe.parallel.rank else np.concatenate([frames for frames in made if frames is not None])
