"""What a call returns: frames in the types that diffusers' pipelines return."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image

    Frames = np.ndarray | Tensor | list[list[Image]]


@dataclass(frozen=True)
class CausalVideoPipelineOutput:
    """The videos of a call, B of them with T frames each.

    Args:
        frames: by `output_type`: "np" float32 (B, T, H, W, 3) in [0, 1]; "pt" float32 (B, T, 3, H, W) in [0, 1]; "pil"
            a list of B lists of T pictures; "latent" float32 (B, C, F, H, W) latents as the transformer has them. None
            on ranks other than 0.
    """

    frames: Any


def as_output(videos: Sequence[np.ndarray], output_type: str) -> Frames:
    """Videos of uint8 (T, H, W, 3) frames as "np", "pt" or "pil"."""
    if output_type == "pil":
        from PIL.Image import fromarray

        return [[fromarray(frame) for frame in video] for video in videos]
    stacked = np.stack(videos).astype(np.float32) / 255
    return torch.from_numpy(stacked).movedim(-1, 2) if output_type == "pt" else stacked
