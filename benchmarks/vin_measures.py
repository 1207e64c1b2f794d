"""What holds a video together, measured from its decoded frames: at given frames (seams), a period later, and between
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
CUT = 3.0  # a scene cut: the picture changes by this many times its usual change,
LEAST = 2.0  # and by this many more of 255 levels,
SMEAR = 4  # within as many frames, over which the codec spreads what one latent frame changes


def measure(frames_THW3: Array, spec: SceneSpec, seams: list[int]) -> dict[str, float]:
    """Means over seams and objects; NaN where there is nothing to measure.

    cut         share of the seams that are scene cuts
    position    how far an object is from where it would be had it gone on evenly, in % of the picture
    velocity    how much its speed differs before and after, in % of the picture a frame
    color       how far its mean colour moves, in 8-bit RGB
    period      how far an object is from where it was a period before, in % of the picture
    lost        share of the frames in which an object of the prompt is not seen
    """
    video = frames_THW3.astype(np.float32)
    change = np.abs(np.diff(video, axis=0)).mean((1, 2, 3))
    usual = float(np.median(change))
    centers_OT2, cover_OTHW = follow(frames_THW3, spec)
    found: dict[str, list[float]] = {name: [] for name in ("cut", "position", "velocity", "color")}
    for seam in seams:
        found["cut"].append(change[seam - 1 : seam - 1 + SMEAR].max() > CUT * usual + LEAST)
        for center_T2, cover_THW in zip(centers_OT2, cover_OTHW, strict=True):
            before, after = center_T2[seam - AROUND : seam], center_T2[seam : seam + AROUND]
            speed, speed_after = (_way(np.diff(x, axis=0)).mean(0) for x in (before, after))
            found["position"].append(100 * float(np.hypot(*_way(after[0] - before[-1] - speed))))
            found["velocity"].append(100 * float(np.hypot(*(speed_after - speed))))
            colors = [_color(video[part], cover_THW[part]) for part in _sides(seam)]
            found["color"].append(float(np.linalg.norm(colors[0] - colors[1])))
    later = _way(centers_OT2[:, PERIOD:] - centers_OT2[:, :-PERIOD])
    means = {name: _mean(values) for name, values in found.items()}
    return means | {
        "period": _mean(100 * np.hypot(later[..., 0], later[..., 1])),
        "lost": float(np.isnan(centers_OT2[..., 0]).mean()),
    }


def agreement(frames_THW3: Array, seams: list[int]) -> dict[str, float]:
    """What first and last chunk have in common, whatever the prompt says.

    background  1 if both are of one word, dark or light
    palette     the share of their objects' colours that is the same; a colour counts as the pixels that it covers
    """
    first, last = (palette(frames_THW3[part]) for part in (slice(0, seams[0]), slice(seams[-1], None)))
    shares = [covered / covered.sum() if covered.sum() else covered for _, covered in (first, last)]
    return {"background": float(first[0] == last[0]), "palette": float(np.minimum(*shares).sum())}


def _sides(seam: int) -> tuple[slice, slice]:
    return slice(seam - AROUND, seam), slice(seam, seam + AROUND)


def _way(difference: Array) -> Array:
    """The shortest way on the torus: a slide wraps round the picture's edge."""
    return (difference + 0.5) % 1 - 0.5


def _color(video_THW3: Array, cover_THW: Array) -> Array:
    solid = cover_THW > 0.9
    return video_THW3[solid].mean(0) if solid.any() else np.full(3, np.nan)


def _mean(values: Any) -> float:
    seen = np.asarray(values, float)
    return float(np.nanmean(seen)) if np.isfinite(seen).any() else float("nan")
