"""The result of a call: frames in the types that diffusers' pipelines return."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image

    from causalrope_sp.pipeline.output import VideoChunk

    Frames = np.ndarray | Tensor | list[list[Image]]


@dataclass(frozen=True)
class CausalVideoPipelineOutput:
    """The videos of a call, B of them with T pixel frames each.

    Args:
        frames: the videos in the type that `output_type` names: "np" is float32 (B, T, H, W, 3) in [0, 1]; "pt" is
            float32 (B, T, 3, H, W) in [0, 1]; "pil" is a list of B lists of T images; "latent" is
            (B, C, F, H, W), the latents in the transformer's own scale, float64 for a float64 transformer, else
            float32. None on ranks other than 0.
    """

    frames: Any


def collect(chunks: Iterable[VideoChunk], bar: Mapping[str, Any]) -> np.ndarray:
    """Takes all chunks of a stream, under a progress bar.

    Args:
        chunks: the stream.
        bar: the options of the bar, which are those of `tqdm.auto.tqdm`.

    Returns:
        The frames, uint8 (T, H, W, 3), on rank 0; an empty array on the other ranks.
    """
    from tqdm.auto import tqdm

    frames: list[np.ndarray] = []
    with tqdm(**bar) as progress:
        for chunk in chunks:
            if chunk.frames is not None:
                frames.append(chunk.frames)
                progress.update(len(chunk.frames))
    return np.concatenate(frames) if frames else np.empty((0, 0, 0, 3), np.uint8)


def as_output(videos: Sequence[np.ndarray], output_type: str) -> Frames:
    """Converts videos to the type of a result.

    Args:
        videos: B arrays of uint8 (T, H, W, 3) frames.
        output_type: "np", "pt" or "pil".

    Returns:
        The frames as `CausalVideoPipelineOutput` describes them.
    """
    if output_type == "pil":
        from PIL.Image import fromarray

        return [[fromarray(frame) for frame in video] for video in videos]
    stacked = np.stack(videos).astype(np.float32) / 255
    return torch.from_numpy(stacked).movedim(-1, 2) if output_type == "pt" else stacked
