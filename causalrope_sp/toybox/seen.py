"""Measures the objects in the frames of a toybox video: coverage, position and size, and the picture's colours.

Every pixel is modelled as a mixture of the background and one palette colour, which gives each object a soft coverage.
Positions and sizes are measured from it on the torus, because a slide wraps round the picture's edge. Positions are
fractions of the picture, y down.

Shapes: T frames, H and W picture, N pixels that are not background, K palette colours, O objects of the prompt.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from causalrope_sp.toybox.prompts import BACKGROUNDS, COLORS, SceneSpec
from causalrope_sp.toybox.scenes import RADII

Array = NDArray[Any]

_NOTHING = (math.nan, math.nan, 0.0, 0.0, 0.0)

BACKGROUND_REACH = 60.0  # how far (in 8-bit RGB) a pixel may be from a background colour and still be it
PALETTE_REACH = 70.0  # how far a pixel may be from every mixture with a palette colour and still be one
NOISE = 25.0  # a pixel that differs less from the background is background
FEWEST = 8  # clear frames below which frames with touching objects are judged too
AREA = {"circle": math.pi, "square": 4 * 0.92**2, "triangle": 2.0}  # in squared radii


@dataclass(frozen=True)
class SeenObject:
    """One object over the T frames; every field is (T,). The centre `x`, `y` is in fractions of the picture, `area` in
    fractions of its area; `fill` is the area against that of the bounding box, `aspect` its width against its height.
    """

    x: Array
    y: Array
    area: Array
    fill: Array
    aspect: Array
    present: Array  # bool: seen at all
    touching: Array  # bool: near the other object, or hidden since it was near
    cut: Array  # bool: reaches over the picture's edge

    @property
    def clear(self) -> Array:
        """The frames in which the object is seen and touches no other, bool (T,)."""
        return self.present & ~self.touching

    @property
    def whole(self) -> Array:
        """The clear frames, and those in which the object touches another but has its usual outline, bool (T,)."""
        usual = best_frames(self.clear, self.present)
        if not usual.any():
            return usual
        fill, aspect = np.median(self.fill[usual]), np.median(self.aspect[usual])
        alike = (abs(self.fill / fill - 1) < 0.04) & (abs(self.aspect / aspect - 1) < 0.06)
        whole: Array = self.clear | (self.present & alike)
        return whole


def follow(frames_THW3: Array, spec: SceneSpec) -> tuple[Array, Array]:
    """Tracks each object of the prompt.

    Args:
        frames_THW3: uint8 (T, H, W, 3).
        spec: the scene of the prompt.

    Returns:
        Centres (O, T, 2), x and y in fractions of the picture, NaN where an object is not seen; and soft coverages,
        (O, T, H, W).
    """
    _, cover_OTHW, _, _ = segment(frames_THW3, [o.color for o in spec.objects])
    tracks = find_objects(cover_OTHW)
    centers = [np.where(t.present[:, None], np.stack([t.x, t.y], 1), math.nan) for t in tracks]
    return np.stack(centers), cover_OTHW


def palette(frames_THW3: Array) -> tuple[str, Array]:
    """Returns the background's word, and the mean share of the picture that each palette colour covers, (K,).

    Args:
        frames_THW3: uint8 (T, H, W, 3).
    """
    background, _, share_TK, _ = segment(frames_THW3, list(COLORS))
    return background, share_TK.mean(0)


def segment(frames: Array, wanted: list[str]) -> tuple[str, Array, Array, Array]:
    """Separates the objects of a video by colour.

    Args:
        frames: uint8 (T, H, W, 3).
        wanted: the colours of the prompt's objects.

    Returns:
        The background's word; each object's soft coverage, (O, T, H, W); the share of the picture that each palette
        colour covers, (T, K); and the share that colours far from all of them cover, (T,).

    Raises:
        ValueError: the frames are not uint8 (T, H, W, 3).
    """
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or not frames.size:
        raise ValueError(f"frames must be uint8 (T, H, W, 3), not {frames.dtype} {frames.shape}")
    pixels = frames.reshape(-1, 3).astype(np.float32)
    near = {w: ((pixels - np.array(c, np.float32)) ** 2).sum(1) < BACKGROUND_REACH**2 for w, c in BACKGROUNDS.items()}
    word = max(near, key=lambda w: int(near[w].sum()))
    base = np.median(pixels[near[word]], axis=0) if near[word].any() else np.array(BACKGROUNDS[word], np.float32)
    offset = pixels - base
    active = np.flatnonzero((offset**2).sum(1) > NOISE**2)
    v_N3 = offset[active]
    d_K3 = np.array(list(COLORS.values()), np.float32) - base
    alpha_NK = np.clip(v_N3 @ d_K3.T / (d_K3**2).sum(1), 0, 1)
    error_NK = np.stack([((v_N3 - alpha_NK[:, k, None] * d) ** 2).sum(1) for k, d in enumerate(d_K3)], 1)
    rows = np.arange(len(active))
    label = error_NK.argmin(1)
    strong = alpha_NK[rows, label] > 0.5
    # The colour of a faint pixel at an outline is mostly noise, so it may only be one of the prompt's.
    prompt_colors = np.array([list(COLORS).index(w) for w in wanted])
    label = np.where(strong, label, prompt_colors[error_NK[:, prompt_colors].argmin(1)])
    known = error_NK[rows, label] < PALETTE_REACH**2
    size = frames.shape[1] * frames.shape[2]
    time = active // size
    # Label K marks the pixels that have no palette colour.
    cell = time * (len(d_K3) + 1) + np.where(known, label, len(d_K3))
    share_TK = np.bincount(cell[strong], minlength=len(frames) * (len(d_K3) + 1)).reshape(len(frames), -1) / size
    cover = np.zeros((len(wanted), len(pixels)), np.float32)
    for i, k in enumerate(prompt_colors):
        own = known & (label == k)
        solid = alpha_NK[own & strong, k]
        plateau = float(np.quantile(solid, 0.7)) if len(solid) else 1.0
        # Steeper about one half: the outline stays where it is, a blur narrows, and faint noise vanishes.
        cover[i, active[own]] = np.clip((alpha_NK[own, k] / plateau - 0.2) / 0.6, 0, 1)
    return word, cover.reshape(len(wanted), *frames.shape[:3]), share_TK[:, :-1], share_TK[:, -1]


def find_objects(cover_OTHW: Array) -> list[SeenObject]:
    """Measures every object in every frame.

    Args:
        cover_OTHW: the objects' soft coverages, from 0 to 1.

    Returns:
        The O objects, in the order of their coverages.
    """
    reach = max(1, round(cover_OTHW.shape[-1] / 64))
    near = [_grow(cover > 0, reach) for cover in cover_OTHW]
    tracks = []
    for i, cover in enumerate(cover_OTHW):
        solid = cover > 0.5
        seen = [_measure(frame) for frame in cover]
        x, y, area, fill, aspect = np.array(seen).T
        present = area > 0.25 * np.quantile(area, 0.9)
        present &= area > 0.25 * AREA["triangle"] * RADII["small"] ** 2
        others = [near[j] for j in range(len(near)) if j != i]
        touching = np.zeros(len(cover), bool)
        for other in others:
            touching |= (near[i] & other).any((1, 2))
        last = False
        for t in range(len(cover)):  # an object that vanished while touching is hidden, not lost
            touching[t] |= last and not present[t]
            last = bool(touching[t])
        cut = solid[:, [0, -1], :].any((1, 2)) | solid[:, :, [0, -1]].any((1, 2))
        tracks.append(SeenObject(x, y, area, fill, aspect, present, touching, cut))
    return tracks


def _grow(mask_THW: Array, reach: int) -> Array:
    """The mask with `reach` more pixels to every side, round the picture's edge."""
    for axis in (1, 2):
        mask_THW = np.any([np.roll(mask_THW, s, axis) for s in range(-reach, reach + 1)], axis=0)
    return mask_THW


def _measure(cover_HW: Array) -> tuple[float, float, float, float, float]:
    """Centre x and y, area, area against bounding box, and width against height, of one object in one frame."""
    height, width = cover_HW.shape
    columns, rows = cover_HW.sum(0), cover_HW.sum(1)
    if columns.sum() < 1:
        return _NOTHING
    cx, cy = _circular_mean(columns), _circular_mean(rows)
    # Bring the object to the middle, and keep what is within reach of it: no shape reaches farther than this.
    left, top = int(cx) - width // 2, int(cy) - height // 2
    middle = np.roll(cover_HW, (-top, -left), (0, 1))
    dx = (np.arange(width) + left + 0.5 - cx)[None, :]
    dy = (np.arange(height) + top + 0.5 - cy)[:, None]
    reach = 1.3 * math.sqrt(cover_HW.sum()) + 2
    middle = np.where((abs(dx) < reach) & (abs(dy) < reach), middle, 0)
    area = float(middle.sum())
    if area < 1:  # specks all over the picture
        return _NOTHING
    x, y = cx + float((middle * dx).sum()) / area, cy + float((middle * dy).sum()) / area
    # The sum of a profile's coverage is the extent to a fraction of a pixel.
    wide, high = float(middle.max(0).sum()), float(middle.max(1).sum())
    return x / width % 1, y / height % 1, area / (height * width), area / (wide * high), wide * height / (high * width)


def _circular_mean(profile: Array) -> float:
    """The mean position, in pixels from the first pixel's edge, on a line whose ends are joined."""
    positions = np.arange(len(profile)) + 0.5
    angle = np.angle((profile * np.exp(2j * np.pi * positions / len(profile))).sum())
    return float(angle) / (2 * math.pi) % 1 * len(profile)


def best_frames(*choices: Array) -> Array:
    """Returns the first choice of frames that has at least `FEWEST` of them, else the last choice.

    Args:
        choices: masks of frames, bool (T,).
    """
    return next((c for c in choices if c.sum() >= FEWEST), choices[-1])
