"""Measures the consistency of a video from its decoded frames: at the seams between chunks, a period later, and between
its first and its last chunk.

Shapes: T frames, H and W picture, O objects of the prompt.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from causalrope_sp.toybox.prompts import SceneSpec
from causalrope_sp.toybox.seen import follow, palette

Array = NDArray[Any]

PERIOD = 64  # pixel frames after which every scene repeats itself
AROUND = 4  # frames on either side of a seam that speeds and colours are taken from
CUT = 3.0  # in a scene cut the frame changes by more than this many times its median change
LEAST = 2.0  # plus this many of 255 levels,
SMEAR = 4  # within so many pixel frames, over which the codec spreads the change of one latent frame


def measure(frames_THW3: Array, spec: SceneSpec, seams: list[int]) -> dict[str, float]:
    """Returns means over seams and objects; NaN if there is nothing to measure.

    cuts                    share of the seams that are scene cuts
    position                distance of an object from its position at constant speed, in % of the frame's size
    velocity                difference of its speeds before and after the seam, in % of the frame's size a frame
    color                   distance of its mean colours before and after the seam, in 8-bit RGB
    position_period_later   distance of an object from its position a period before, in % of the frame's size
    not_found               share of the frames in which an object of the prompt is not found
    """
    video = frames_THW3.astype(np.float32)
    change = np.abs(np.diff(video, axis=0)).mean((1, 2, 3))
    median = float(np.median(change))
    centers_OT2, cover_OTHW = follow(frames_THW3, spec)
    found: dict[str, list[float]] = {name: [] for name in ("cuts", "position", "velocity", "color")}
    for seam in seams:
        found["cuts"].append(change[seam - 1 : seam - 1 + SMEAR].max() > CUT * median + LEAST)
        for center_T2, cover_THW in zip(centers_OT2, cover_OTHW, strict=True):
            before, after = center_T2[seam - AROUND : seam], center_T2[seam : seam + AROUND]
            speed, speed_after = (_shortest(np.diff(x, axis=0)).mean(0) for x in (before, after))
            found["position"].append(100 * float(np.hypot(*_shortest(after[0] - before[-1] - speed))))
            found["velocity"].append(100 * float(np.hypot(*(speed_after - speed))))
            colors = [_color(video[part], cover_THW[part]) for part in _sides(seam)]
            found["color"].append(float(np.linalg.norm(colors[0] - colors[1])))
    later = _shortest(centers_OT2[:, PERIOD:] - centers_OT2[:, :-PERIOD])
    means = {name: _mean(values) for name, values in found.items()}
    return means | {
        "position_period_later": _mean(100 * np.hypot(later[..., 0], later[..., 1])),
        "not_found": float(np.isnan(centers_OT2[..., 0]).mean()),
    }


def agreement(frames_THW3: Array, seams: list[int]) -> dict[str, float]:
    """Compares the first and the last chunk, independently of the prompt.

    one_background      1 if both backgrounds have the same name, dark or light, else 0
    colors_in_common    the share of their objects' colours that is the same, weighted by the pixels of each colour
    """
    first, last = (palette(frames_THW3[part]) for part in (slice(0, seams[0]), slice(seams[-1], None)))
    shares = [covered / covered.sum() if covered.sum() else covered for _, covered in (first, last)]
    return {"one_background": float(first[0] == last[0]), "colors_in_common": float(np.minimum(*shares).sum())}


def _sides(seam: int) -> tuple[slice, slice]:
    return slice(seam - AROUND, seam), slice(seam, seam + AROUND)


def _shortest(difference: Array) -> Array:
    """Returns the shortest difference of positions on the torus, since slides wrap round the frame's edge."""
    return (difference + 0.5) % 1 - 0.5


def _color(video_THW3: Array, cover_THW: Array) -> Array:
    solid = cover_THW > 0.9
    return video_THW3[solid].mean(0) if solid.any() else np.full(3, np.nan)


def _mean(values: Any) -> float:
    numbers = np.asarray(values, float)
    return float(np.nanmean(numbers)) if np.isfinite(numbers).any() else float("nan")
