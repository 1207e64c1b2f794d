"""Describes a toybox video: the sentences of the grammar, with starts, that its frames may show.

Colours, centres and sizes are measured (`seen`), and every motion is fitted to the centres. What measuring leaves open,
the shape above all, is left to whoever compares the sentences.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from causalrope_sp.errors import PromptError
from causalrope_sp.toybox.prompts import BACKGROUNDS, COLORS, MOTIONS, SHAPES, SIZES, ObjectSpec, SceneSpec
from causalrope_sp.toybox.scenes import track
from causalrope_sp.toybox.seen import follow, palette

LEAST_SHARE = 0.004  # of the picture, that an object's colour covers
HALVES = ((0.0, 1.0), (0.0, 0.5), (0.5, 1.0))
NEAR = 1.5  # a motion is possible up to so many times the error of the best one


@dataclass(frozen=True)
class _Fit:
    """A motion with the starts, in hundredths, that fit an object best, and the mean distance of its centres."""

    spec: ObjectSpec
    starts: tuple[int, int, int]
    error: float


def describe(frames_THW3: np.ndarray) -> list[str]:
    """Describes a video. Shapes are not told apart: each is named in a sentence of its own.

    Args:
        frames_THW3: uint8 (T, H, W, 3).

    Returns:
        The sentences that the video may show, the likeliest motions first.

    Raises:
        ValueError: the frames are not uint8 (T, H, W, 3).
        PromptError: the video shows no object in a colour of the palette, or more than two.
    """
    background, share_K = palette(frames_THW3)
    shown = [color for color, share in zip(COLORS, share_K, strict=True) if share > LEAST_SHARE]
    if not 1 <= len(shown) <= 2:
        raise PromptError(f"a toybox scene has one or two objects, and the video has {len(shown)} colours")
    assert background in BACKGROUNDS, "the background's word is of the grammar"
    blank = [ObjectSpec("medium", color, "circle", "stays still") for color in shown]
    centers_OT2, cover_OTHW = follow(frames_THW3, SceneSpec(tuple(blank), background))
    sentences: list[tuple[float, str]] = []
    for order in itertools.permutations(range(len(shown))):
        halves = HALVES[:1] if len(shown) == 1 else HALVES[1:]
        fits = [_fits(shown[i], centers_OT2[i], cover_OTHW[i], half) for i, half in zip(order, halves, strict=True)]
        for objects in itertools.product(*fits):
            error = sum(each.error for each in objects)
            for shapes in itertools.product(SHAPES, repeat=len(objects)):
                specs = [
                    ObjectSpec(each.spec.size, each.spec.color, shape, each.spec.motion)
                    for each, shape in zip(objects, shapes, strict=True)
                ]
                numbers = " ".join(str(hundredth) for each in objects for hundredth in each.starts)
                sentences.append((error, f"{SceneSpec(tuple(specs), background).prompt()} at {numbers}"))
    best = min(error for error, _ in sentences)
    return [sentence for error, sentence in sorted(sentences) if error <= NEAR * best + 1e-3]


def _fits(color: str, center_T2: np.ndarray, cover_THW: np.ndarray, half: tuple[float, float]) -> list[_Fit]:
    """Every size and motion with the starts that fit best."""
    seen = np.flatnonzero(np.isfinite(center_T2[:, 0]))
    frames, wanted = torch.from_numpy(seen).float(), torch.from_numpy(center_T2[seen]).float()
    area_T = torch.from_numpy(cover_THW[seen].mean((1, 2))).float()
    return [_fit(ObjectSpec(s, color, "circle", m), frames, wanted, area_T, half) for s in SIZES for m in MOTIONS]


def _fit(spec: ObjectSpec, frames: Tensor, wanted_T2: Tensor, area_T: Tensor, half: tuple[float, float]) -> _Fit:
    """Finds one number after the other, since each moves the centre along one axis or in time alone."""
    starts = [50, 50, 50]
    for number in (0, 1, 0, 2):
        errors = []
        for hundredth in range(100):
            starts[number] = hundredth
            errors.append(_error(spec, starts, frames, wanted_T2, area_T, half))
        starts[number] = int(np.argmin(errors))
    return _Fit(spec, (starts[0], starts[1], starts[2]), min(errors))


def _error(
    spec: ObjectSpec, starts: list[int], frames: Tensor, wanted_T2: Tensor, area_T: Tensor, half: tuple[float, float]
) -> float:
    """The mean distance of centres on the torus, and the mean difference of radii, which areas tell roughly."""
    path = track(spec, [(hundredth + 0.5) / 100 for hundredth in starts], half, frames)
    off = (path.center_T2 - wanted_T2 + 0.5) % 1 - 0.5
    radius = (area_T / 3.0).sqrt()  # of a circle; squares and triangles are within a fifth of it
    return float(off.norm(dim=1).mean() + 0.5 * (path.radius_T - radius).abs().mean())
