"""A toybox that takes a control: a picture of where the object is, added to its tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from causalrope_sp import CausalVideoPipeline, SequenceParallel
from causalrope_sp.pipeline.conditioning import VideoLatents
from causalrope_sp.toybox.prompts import COLORS
from causalrope_sp.toybox.scenes import RADII
from causalrope_sp.toybox.toybox_text import leave_open
from causalrope_sp.weights import save_diffusers

DARK = (27, 27, 33)  # as the model paints it
CHUNK = 3  # latent frames


def controlled_toybox(parallel: SequenceParallel | None = None, **options: Any) -> CausalVideoPipeline:
    """toybox with as many channels of control as of latents, which its patch embedding weighs as it weighs those."""
    parallel = parallel or SequenceParallel.single(device="cpu")
    pipe = CausalVideoPipeline.from_pretrained("toybox", parallel=parallel, **options)
    channels = pipe.model.config.in_channels
    model = pipe.model.with_control(channels)
    weight = model.patch_embedding.weight.unflatten(1, (-1, 2 * channels))
    weight[..., channels:] = weight[..., :channels]
    pipe.model = model
    return pipe


def circle_at(pipe: CausalVideoPipeline, x: float, y: float, frames: int = CHUNK) -> Tensor:
    """The control of a red circle, (1, F, C, H, W): the latents of its picture less those of an empty one."""
    rows, columns = np.mgrid[0:64, 0:64] / 64
    inside = (columns - x) ** 2 + (rows - y) ** 2 < RADII["medium"] ** 2
    empty = np.tile(np.array(DARK, np.uint8), (64, 64, 1))
    picture = np.where(inside[..., None], np.array(COLORS["red"], np.uint8), empty)
    count = 1 + 4 * (frames - 1)
    drawn, nothing = (VideoLatents(pipe.codec, iter([image] * count)).take(frames) for image in (picture, empty))
    return drawn - nothing


def text_without_place(pipe: CausalVideoPipeline) -> Tensor:
    """A red circle, without where it is."""
    return leave_open(pipe.text.encode("a red circle pulses", 0), starts=True)


def seen_at(frame_HW3: np.ndarray) -> tuple[float, float]:
    """The centre of what is not background, x and y in fractions of the picture. Whatever its colour: the latents that
    a control makes are none that the decoder has learned, and it may draw them in another one."""
    rows, columns = np.nonzero(np.abs(frame_HW3.astype(int) - DARK).sum(-1) > 120)
    return float(columns.mean() / 64), float(rows.mean() / 64)


def noise_control(chunk: Any, channels: int = 16) -> Tensor:
    """A control of random numbers, another one for each frame."""
    frames = range(chunk.start, chunk.stop)
    every = [torch.randn(channels, 8, 8, generator=torch.Generator().manual_seed(f)) for f in frames]
    return 0.3 * torch.stack(every).unsqueeze(0)


def write_controlled_toybox(folder: Path) -> Path:
    """Writes `controlled_toybox` as a model folder and returns it."""
    pipe = controlled_toybox()
    CausalVideoPipeline.from_pretrained("toybox", device="cpu").save_pretrained(folder)
    save_diffusers(pipe.model, folder / "transformer")
    return folder
