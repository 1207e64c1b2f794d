"""Judges from a toybox video's frames alone whether each object of the prompt has its colour, shape and motion.

The module `seen` measures the objects. Frames in which two objects touch are left out if enough others remain.
Positions are fractions of the picture, y down.

Shapes: T frames, H and W picture, K palette colours.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from causalrope_sp.toybox.prompts import COLORS, ObjectSpec, SceneSpec
from causalrope_sp.toybox.scenes import BOUNCE_FRAMES, ORBIT_FRAMES, PULSE_DEPTH, PULSE_FRAMES, RADII, SLIDE_FRAMES
from causalrope_sp.toybox.seen import AREA, FEWEST, SeenObject, best_frames, find_objects, segment

Array = NDArray[Any]

FILL = (("triangle", 0.38, 0.66), ("circle", 0.66, 0.89), ("square", 0.89, 1.1))  # area against bounding box
PLAUSIBLE = (0.5, 1.9)  # area against the area that the prompt's size and shape words mean
FOREIGN = 0.006  # the share of the picture that colours outside the prompt may cover: a quarter of a small object
MOST = 0.8  # the share of frames that "most frames" means
STEADY = 0.95  # phase coherence from which a position counts as moving evenly; 1 is exactly even
SPEED_TOLERANCE = 0.25


@dataclass(frozen=True)
class Verdict:
    """The three judgements of one object of the prompt, and the measurements behind them."""

    spec: ObjectSpec
    color: bool
    shape: bool
    motion: bool
    background: bool  # of the whole picture; no part of the three
    seen_colors: str  # palette colours that cover more than next to nothing in most frames, largest first
    seen_shape: str
    seen_motion: str
    area: float  # against the area that the prompt's words mean (median)
    fill: float  # area against bounding box (median)
    speed: float  # against the speed that the motion word means; 0 where there is none
    foreign: float  # share of the picture that colours outside the prompt cover (median)
    clear_frames: int  # frames in which the object is seen and touches no other


def judge(frames_THW3: Array, spec: SceneSpec) -> list[Verdict]:
    """Judges a video.

    Colours outside the prompt count against every object of the picture.

    Args:
        frames_THW3: uint8 (T, H, W, 3).
        spec: the scene of the prompt.

    Returns:
        One verdict for each object of the prompt, in the prompt's order.

    Raises:
        ValueError: the frames are not uint8 (T, H, W, 3), or two objects of the prompt have the same colour.
    """
    wanted = [o.color for o in spec.objects]
    if len(set(wanted)) < len(wanted):
        raise ValueError("objects are distinguished by their colours; the prompt has two of one colour")
    background, cover_OTHW, share_TK, other_T = segment(frames_THW3, wanted)
    tracks = find_objects(cover_OTHW)
    names = list(COLORS)
    foreign_T = share_TK[:, [k for k, name in enumerate(names) if name not in wanted]].sum(1) + other_T
    usual = np.quantile(share_TK, 1 - MOST, axis=0)
    seen_colors = [names[k] for k in np.argsort(-usual) if usual[k] > FOREIGN]
    verdicts = []
    for obj, track in zip(spec.objects, tracks, strict=True):
        color, area = _color(track, obj, foreign_T)
        shape, fill = _shape(track)
        motion, speed = _motion(track)
        verdicts.append(
            Verdict(
                spec=obj,
                color=color,
                shape=shape == obj.shape,
                motion=motion == obj.motion,
                background=background == spec.background,
                seen_colors=" ".join(seen_colors) or "none",
                seen_shape=shape,
                seen_motion=motion,
                area=area,
                fill=fill,
                speed=speed,
                foreign=float(np.median(foreign_T)),
                clear_frames=int(track.clear.sum()),
            )
        )
    return verdicts


def summarize(verdicts: Iterable[Verdict]) -> dict[str, float]:
    """Returns the number of objects, and the shares of them with the right color, shape, motion, all three ("all"), and
    background.

    Args:
        verdicts: the verdicts of one or more videos.
    """
    rows = [(v.color, v.shape, v.motion, v.color and v.shape and v.motion, v.background) for v in verdicts]
    shares = np.mean(rows, axis=0) if rows else np.full(5, math.nan)
    names = ("color", "shape", "motion", "all", "background")
    return {"objects": len(rows), **dict(zip(names, shares.tolist(), strict=True))}


def _color(track: SeenObject, obj: ObjectSpec, foreign_T: Array) -> tuple[bool, float]:
    """Whether the object's colour covers what its words mean and foreign colours nothing, and the area it covers."""
    area = track.area / (AREA[obj.shape] * RADII[obj.size] ** 2)
    low, high = PLAUSIBLE
    if obj.motion == "pulses":
        low, high = low * (1 - PULSE_DEPTH) ** 2, high * (1 + PULSE_DEPTH) ** 2
    judged = ~track.touching
    if judged.sum() < FEWEST and judged.sum() < MOST * len(judged):  # half hidden for good: what shows must show
        judged, low = np.ones_like(judged), 0.25 * low
    plausible = (area > low) & (area < high) & (foreign_T < FOREIGN)
    return bool(plausible[judged].mean() >= MOST), float(np.median(area[judged]))


def _shape(track: SeenObject) -> tuple[str, float]:
    """The shape's word, and area against bounding box (median)."""
    frames = best_frames(track.clear & ~track.cut, track.clear, track.present)
    if not frames.any():
        return "none", 0.0
    fill, aspect = float(np.median(track.fill[frames])), float(np.median(track.aspect[frames]))
    if not 0.7 < aspect < 1.4:
        return "unclear", fill
    return next((word for word, low, high in FILL if low <= fill < high), "unclear"), fill


def _motion(track: SeenObject) -> tuple[str, float]:
    """The motion's word, and its speed against what the word means (0 where it means none)."""
    frames = best_frames(track.whole, track.present)
    hidden = track.touching & ~track.present
    if frames.sum() < 2 or track.present.sum() < MOST * (~hidden).sum():
        return "gone", 0.0
    t, x, y = np.flatnonzero(frames), track.x[frames], track.y[frames]
    out = np.hypot(x - 0.5, y - 0.5)
    turn, steady = _rate(np.arctan2(y - 0.5, x - 0.5) / (2 * math.pi), t)
    speed = turn * ORBIT_FRAMES
    # Orbits come first, because the visible part of an orbit that another object hides can look like a slide.
    if _right(speed) and steady > STEADY and np.median(out) > 0.15 and out.std() < 0.25 * out.mean():
        return f"orbits {'clockwise' if speed > 0 else 'counterclockwise'}", abs(speed)
    rate_x, steady_x = _rate(x, t)
    rate_y, steady_y = _rate(y, t)
    if min(steady_x, steady_y) > STEADY:
        return _even_motion(rate_x * SLIDE_FRAMES, rate_y * SLIDE_FRAMES, np.sqrt(track.area[frames]), t)
    if steady_x > STEADY and abs(rate_x * SLIDE_FRAMES) < SPEED_TOLERANCE and np.ptp(y) > 0.25:
        pace, swings = _swing(y, t, BOUNCE_FRAMES)
        return ("bounces" if swings else "unclear"), pace
    return "unclear", 0.0


def _even_motion(across: float, down: float, size: Array, t: Array) -> tuple[str, float]:
    """The word of an object that moves evenly, or not at all; `across` and `down` against a slide's speed."""
    speed = max(abs(across), abs(down))
    if _right(speed) and min(abs(across), abs(down)) < SPEED_TOLERANCE:
        horizontal = abs(across) > abs(down)
        positive = (across if horizontal else down) > 0
        return f"slides {('left', 'right')[positive] if horizontal else ('up', 'down')[positive]}", speed
    if speed > SPEED_TOLERANCE:
        return "unclear", speed
    if float(np.quantile(size, 0.95) - np.quantile(size, 0.05)) < 0.5 * PULSE_DEPTH * float(np.median(size)):
        return "stays still", 0.0
    pace, swings = _swing(size, t, PULSE_FRAMES)
    return ("pulses" if swings else "unclear"), pace


def _right(speed: float) -> bool:
    """Whether a speed, relative to the one that the word means, is within the tolerance."""
    return abs(abs(speed) - 1) <= SPEED_TOLERANCE


def _rate(phase: Array, t: Array) -> tuple[float, float]:
    """The even rate (turns a frame) that explains a phase best, and how well: 1 if exactly, near 0 if not at all.

    Unlike a line through the unwrapped phase, this takes any gap between frames.
    """
    fastest = 3 / min(SLIDE_FRAMES, ORBIT_FRAMES)
    rates = np.linspace(-fastest, fastest, 601)
    match = abs(np.exp(2j * np.pi * (phase - rates[:, None] * t)).mean(1))
    best = int(match.argmax())
    return float(rates[best]), float(match[best])


def _swing(value: Array, t: Array, period: float) -> tuple[float, bool]:
    """How fast a value swings to and fro against one swing a period, and whether it does, at about that pace.

    The best sine of any pace is fitted, which takes any gap between frames.
    """
    paces = np.linspace(0.3, 3, 136)
    angle = 2 * math.pi * paces[:, None] * t / period
    basis = np.stack([np.ones_like(angle), np.cos(angle), np.sin(angle)], -1)
    square = basis.transpose(0, 2, 1) @ basis + 1e-3 * len(t) * np.eye(3)
    centered = value - value.mean()
    weights = np.linalg.solve(square, basis.transpose(0, 2, 1) @ centered[:, None])
    left = ((basis @ weights)[..., 0] - centered).var(1) / centered.var()
    # If gaps leave several paces that fit almost equally well, the expected one is preferred.
    good = (left < 0.3) & (left < left.min() + 0.1) & (paces > 0.6) & (paces < 1.6)
    best = int(np.where(good, left, np.inf).argmin() if good.any() else left.argmin())
    return float(paces[best]), bool(good[best])
