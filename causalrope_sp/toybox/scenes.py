"""Ground truth for toybox: renders any prompt of the grammar as anti-aliased frames.

Coordinates are fractions of the picture, x to the right and y down; time is counted in pixel frames at 16 fps.
Six uniform numbers, three an object, set what a prompt leaves open: where an object starts, and its phase. They are
drawn from the seed and are part of the text embeddings.

Shapes: N scenes, O = 2 objects, T frames, X picture width = height.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from causalrope_sp.toybox.prompts import BACKGROUNDS, COLORS, MOTIONS, SHAPES, SIZES, ObjectSpec, SceneSpec

RADII = {"small": 11 / 128, "medium": 17 / 128, "large": 24 / 128}
SLIDE_FRAMES = 64  # pixel frames to cross the picture once
BOUNCE_FRAMES = 32  # from floor to floor
ORBIT_FRAMES = 64
PULSE_FRAMES = 32
ORBIT_RADIUS = 0.28
PULSE_DEPTH = 0.3
MARGIN = 0.03

START_VARIABLES = 6  # the starts of a scene: of each object uniform numbers along and across its path, and a phase

_DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}


@dataclass(frozen=True)
class Track:
    """The path of one object over T frames: centre (T, 2) and radius (T,) in fractions of the picture."""

    center_T2: Tensor
    radius_T: Tensor


def track(spec: ObjectSpec, start: Sequence[float], half: tuple[float, float], frames: Tensor) -> Track:
    """Computes the path of one object.

    Args:
        spec: the object.
        start: its three uniform numbers in [0, 1].
        half: the horizontal range, in fractions of the picture, that it stays in where its motion allows.
        frames: the numbers of the pixel frames, (T,).

    Returns:
        Its path over the T frames.
    """
    base = RADII[spec.size]
    radius = torch.full_like(frames, base)
    reach = base * (1 + PULSE_DEPTH if spec.motion == "pulses" else 1)
    low, high = max(half[0], reach + MARGIN), min(half[1], 1 - reach - MARGIN)
    low, high = min(low, high), max(low, high)
    across = low + (high - low) * start[1]
    if spec.motion.startswith("slides"):
        dx, dy = _DIRECTIONS[spec.motion.split()[1]]
        along = (start[0] + (dx + dy) * frames / SLIDE_FRAMES) % 1.0
        still = torch.full_like(frames, across)
        center = torch.stack([along, still] if dx else [still, along], -1)
    elif spec.motion == "bounces":
        phase = (frames / BOUNCE_FRAMES + start[0]) % 1.0
        top, floor = base + 2 * MARGIN, 1 - base - MARGIN
        center = torch.stack([torch.full_like(frames, across), floor - (floor - top) * 4 * phase * (1 - phase)], -1)
    elif spec.motion.startswith("orbits"):
        turn = 1 if spec.motion.endswith(" clockwise") else -1
        angle = 2 * math.pi * (start[0] + turn * frames / ORBIT_FRAMES)
        center = 0.5 + ORBIT_RADIUS * torch.stack([angle.cos(), angle.sin()], -1)
    else:
        center = torch.tensor([across, reach + MARGIN + (1 - 2 * (reach + MARGIN)) * start[0]]).expand(len(frames), 2)
        if spec.motion == "pulses":
            radius = base * (1 + PULSE_DEPTH * torch.sin(2 * math.pi * (frames / PULSE_FRAMES + start[2])))
    return Track(center, radius)


def tracks(spec: SceneSpec, starts: Sequence[float], frames: Tensor) -> list[Track]:
    """Computes the paths of all objects of a scene. Two objects stay in one half of the picture each if their motions
    allow it.

    Args:
        spec: the scene.
        starts: the scene's six uniform numbers in [0, 1].
        frames: the numbers of the pixel frames, (T,).

    Returns:
        The path of each object over the T frames, in the order of the scene.
    """
    halves = [(0.0, 1.0)] if len(spec.objects) == 1 else [(0.0, 0.5), (0.5, 1.0)]
    return [track(o, starts[3 * i : 3 * i + 3], half, frames) for i, (o, half) in enumerate(zip(spec.objects, halves))]


def _signed_distance(shape: str, offset: Tensor, radius: Tensor) -> Tensor:
    """Distance to the outline (negative inside); offset (…, 2) from the centre, radius broadcastable."""
    x, y = offset.unbind(-1)
    if shape == "circle":
        return torch.hypot(x, y) - radius
    if shape == "square":
        return torch.maximum(x.abs(), y.abs()) - 0.92 * radius
    slope = math.sqrt(5)  # the sides of a triangle as wide as it is high: 2·(|x|) falls by 1 as y falls by 1
    return torch.maximum(y - radius, (2 * x.abs() - (y + radius)) / slope)


def render(specs: Sequence[SceneSpec], starts_N6: Tensor, frames: Tensor, size: int) -> Tensor:
    """Renders N scenes. A slide wraps round the picture's edge.

    Args:
        specs: the scenes.
        starts_N6: the six uniform numbers of each.
        frames: the numbers of the pixel frames, (T,).
        size: pixels of the picture's width and height.

    Returns:
        Frames, float32 in [0, 1], (N, 3, T, size, size).
    """
    video = torch.empty(len(specs), 3, len(frames), size, size)
    for n, spec in enumerate(specs):
        video[n] = torch.tensor(BACKGROUNDS[spec.background]).view(3, 1, 1, 1) / 255
        for obj, cover_TXX in zip(spec.objects, coverage(spec, starts_N6[n].tolist(), frames, size)):
            video[n].lerp_(torch.tensor(COLORS[obj.color]).view(3, 1, 1, 1) / 255, cover_TXX)
    return video


def coverage(spec: SceneSpec, starts: Sequence[float], frames: Tensor, size: int) -> list[Tensor]:
    """Computes how much of each pixel each object of a scene covers, also behind the objects that follow it.

    Args:
        spec: the scene.
        starts: the scene's six uniform numbers in [0, 1].
        frames: the numbers of the pixel frames, (T,).
        size: pixels of the picture's width and height.

    Returns:
        For each object shares from 0 to 1, float32, (T, size, size).
    """
    axis = (torch.arange(size) + 0.5) / size
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1)
    found = []
    for obj, path in zip(spec.objects, tracks(spec, starts, frames.to(torch.float32))):
        offset = grid - path.center_T2[:, None, None]
        if obj.motion.startswith("slides"):
            offset = (offset + 0.5) % 1.0 - 0.5
        distance = _signed_distance(obj.shape, offset, path.radius_T[:, None, None])
        found.append((0.5 - distance * size).clamp(0, 1))
    return found


def random_scene(generator: torch.Generator) -> SceneSpec:
    """Draws a scene uniformly from the grammar; half of the scenes have two objects, of different colours.

    Args:
        generator: the source of randomness.
    """

    def pick(options: Sequence[str]) -> str:
        return options[int(torch.randint(len(options), (), generator=generator))]

    count = int(torch.randint(1, 3, (), generator=generator))
    colors = [list(COLORS)[i] for i in torch.randperm(len(COLORS), generator=generator)[:count]]
    objects = tuple(ObjectSpec(pick(SIZES), color, pick(SHAPES), pick(MOTIONS)) for color in colors)
    return SceneSpec(objects, pick(list(BACKGROUNDS)))
