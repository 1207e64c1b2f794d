"""Judges a toybox video from its frames alone: has each object of the prompt its colour, its shape, its motion?

Every pixel is read as a mixture of the background and one palette colour, which gives each object a soft coverage;
places and sizes are measured from it on the torus (a slide wraps round the picture's edge). Frames in which two
objects touch are left out wherever enough others are left. Places are fractions of the picture, y down.

Shapes: T frames, H and W picture, N pixels that are not background, K palette colours, O objects of the prompt.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from causalrope_sp.toybox.prompts import BACKGROUNDS, COLORS, ObjectSpec, SceneSpec
from causalrope_sp.toybox.scenes import BOUNCE_FRAMES, ORBIT_FRAMES, PULSE_DEPTH, PULSE_FRAMES, RADII, SLIDE_FRAMES

Array = NDArray[Any]

_NOTHING = (math.nan, math.nan, 0.0, 0.0, 0.0)

AREA = {"circle": math.pi, "square": 4 * 0.92**2, "triangle": 2.0}  # in squared radii
FILL = (("triangle", 0.38, 0.66), ("circle", 0.66, 0.89), ("square", 0.89, 1.1))  # area against bounding box
BACKGROUND_REACH = 60.0  # how far (in 8-bit RGB) a pixel may be from a background colour and still be it
PALETTE_REACH = 70.0  # how far a pixel may be from every mixture with a palette colour and still be one
NOISE = 25.0  # a pixel that differs less from the background is background
PLAUSIBLE = (0.5, 1.9)  # area against the area that the prompt's size and shape words mean
FOREIGN = 0.006  # the share of the picture that colours outside the prompt may cover: a quarter of a small object
MOST = 0.8  # the share of frames that "most frames" means
STEADY = 0.95  # phase coherence from which a place counts as moving evenly; 1 is exactly even
SPEED_TOLERANCE = 0.25
FEWEST = 8  # clear frames below which frames with touching objects are judged too


@dataclass(frozen=True)
class Verdict:
    """What one object of the prompt turned out to be: three judgements, and what they were made from."""

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


@dataclass(frozen=True)
class _Track:
    """One object over the T frames, in fractions of the picture (area: of the picture's area)."""

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
        return self.present & ~self.touching

    @property
    def whole(self) -> Array:
        """The clear frames and those in which the object touches another but its outline is as it always is."""
        usual = _best_frames(self.clear, self.present)
        if not usual.any():
            return usual
        fill, aspect = np.median(self.fill[usual]), np.median(self.aspect[usual])
        alike = (abs(self.fill / fill - 1) < 0.04) & (abs(self.aspect / aspect - 1) < 0.06)
        whole: Array = self.clear | (self.present & alike)
        return whole


def judge(frames_THW3: Array, spec: SceneSpec) -> list[Verdict]:
    """One verdict for each object of the prompt, in the prompt's order.

    Colours outside the prompt count against every object of the picture.

    Raises:
        ValueError: the frames are not uint8 (T, H, W, 3), or two objects of the prompt have the same colour.
    """
    if frames_THW3.dtype != np.uint8 or frames_THW3.ndim != 4 or frames_THW3.shape[-1] != 3 or not len(frames_THW3):
        raise ValueError(f"frames must be uint8 (T, H, W, 3), not {frames_THW3.dtype} {frames_THW3.shape}")
    wanted = [o.color for o in spec.objects]
    if len(set(wanted)) < len(wanted):
        raise ValueError("objects are told apart by their colours; the prompt has two of one colour")
    background, cover_OTHW, share_TK, other_T = _segment(frames_THW3, wanted)
    tracks = _tracks(cover_OTHW)
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


def follow(frames_THW3: Array, spec: SceneSpec) -> tuple[Array, Array]:
    """Where each object of the prompt is: its centre (O, T, 2), x and y in fractions of the picture, NaN where it is
    not seen; and the soft coverage of its pixels, (O, T, H, W)."""
    _, cover_OTHW, _, _ = _segment(frames_THW3, [o.color for o in spec.objects])
    tracks = _tracks(cover_OTHW)
    centers = [np.where(t.present[:, None], np.stack([t.x, t.y], 1), math.nan) for t in tracks]
    return np.stack(centers), cover_OTHW


def summarize(verdicts: Iterable[Verdict]) -> dict[str, float]:
    """The number of objects, and the share of them with each thing right ("all": colour, shape and motion)."""
    rows = [(v.color, v.shape, v.motion, v.color and v.shape and v.motion, v.background) for v in verdicts]
    shares = np.mean(rows, axis=0) if rows else np.full(5, math.nan)
    names = ("color", "shape", "motion", "all", "background")
    return {"objects": len(rows), **dict(zip(names, shares.tolist(), strict=True))}


def _segment(frames: Array, wanted: list[str]) -> tuple[str, Array, Array, Array]:
    """The background's word, each object's soft coverage (O, T, H, W), and the shares of the picture (T, K) that the
    palette colours cover and (T,) that colours far from all of them cover."""
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
    ours = np.array([list(COLORS).index(w) for w in wanted])
    label = np.where(strong, label, ours[error_NK[:, ours].argmin(1)])
    known = error_NK[rows, label] < PALETTE_REACH**2
    size = frames.shape[1] * frames.shape[2]
    time = active // size
    # Label K stands for the pixels that are no palette colour.
    place = time * (len(d_K3) + 1) + np.where(known, label, len(d_K3))
    share_TK = np.bincount(place[strong], minlength=len(frames) * (len(d_K3) + 1)).reshape(len(frames), -1) / size
    cover = np.zeros((len(wanted), len(pixels)), np.float32)
    for i, k in enumerate(ours):
        mine = known & (label == k)
        solid = alpha_NK[mine & strong, k]
        plateau = float(np.quantile(solid, 0.7)) if len(solid) else 1.0
        # Steeper about one half: the outline stays where it is, a blur narrows, and faint noise vanishes.
        cover[i, active[mine]] = np.clip((alpha_NK[mine, k] / plateau - 0.2) / 0.6, 0, 1)
    return word, cover.reshape(len(wanted), *frames.shape[:3]), share_TK[:, :-1], share_TK[:, -1]


def _tracks(cover_OTHW: Array) -> list[_Track]:
    """Measures every object in every frame."""
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
        for t in range(len(cover)):  # an object that vanished while touching is hidden, not gone
            touching[t] |= last and not present[t]
            last = bool(touching[t])
        cut = solid[:, [0, -1], :].any((1, 2)) | solid[:, :, [0, -1]].any((1, 2))
        tracks.append(_Track(x, y, area, fill, aspect, present, touching, cut))
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
    """The mean place, in pixels from the first one's edge, on a line whose ends are joined."""
    places = np.arange(len(profile)) + 0.5
    angle = np.angle((profile * np.exp(2j * np.pi * places / len(profile))).sum())
    return float(angle) / (2 * math.pi) % 1 * len(profile)


def _color(track: _Track, obj: ObjectSpec, foreign_T: Array) -> tuple[bool, float]:
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


def _best_frames(*choices: Array) -> Array:
    """The first choice of frames that leaves enough of them, else the last."""
    return next((c for c in choices if c.sum() >= FEWEST), choices[-1])


def _shape(track: _Track) -> tuple[str, float]:
    """The shape's word, and area against bounding box (median)."""
    frames = _best_frames(track.clear & ~track.cut, track.clear, track.present)
    if not frames.any():
        return "none", 0.0
    fill, aspect = float(np.median(track.fill[frames])), float(np.median(track.aspect[frames]))
    if not 0.7 < aspect < 1.4:
        return "unclear", fill
    return next((word for word, low, high in FILL if low <= fill < high), "unclear"), fill


def _motion(track: _Track) -> tuple[str, float]:
    """The motion's word, and its speed against what the word means (0 where it means none)."""
    frames = _best_frames(track.whole, track.present)
    hidden = track.touching & ~track.present
    if frames.sum() < 2 or track.present.sum() < MOST * (~hidden).sum():
        return "gone", 0.0
    t, x, y = np.flatnonzero(frames), track.x[frames], track.y[frames]
    out = np.hypot(x - 0.5, y - 0.5)
    turn, steady = _rate(np.arctan2(y - 0.5, x - 0.5) / (2 * math.pi), t)
    speed = turn * ORBIT_FRAMES
    # First, because the part of an orbit that another object leaves in sight can pass for something straighter.
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
    # Where gaps leave several paces that explain it nearly alike, the right one has the benefit.
    good = (left < 0.3) & (left < left.min() + 0.1) & (paces > 0.6) & (paces < 1.6)
    best = int(np.where(good, left, np.inf).argmin() if good.any() else left.argmin())
    return float(paces[best]), bool(good[best])
