"""The judge on ground truth: right prompts, wrong prompts, worn pictures, and pictures with known faults."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from itertools import chain, pairwise
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from causalrope_sp.toybox.described import describe
from causalrope_sp.toybox.judge import Verdict, judge, summarize
from causalrope_sp.toybox.prompts import COLORS, MOTIONS, SHAPES, SceneSpec, parse_prompt
from causalrope_sp.toybox.scenes import random_scene, render
from causalrope_sp.toybox.seen import palette

Frames = NDArray[np.uint8]
FRAMES = 81


def _video(spec: SceneSpec, starts: torch.Tensor, size: int, speed: float = 1.0) -> Frames:
    pixels = render([spec], starts[None], torch.arange(FRAMES) * speed, size)[0]
    return (pixels.permute(1, 2, 3, 0) * 255).round().to(torch.uint8).numpy()


def _scenes(count: int, seed: int, size: int) -> Iterator[tuple[SceneSpec, Frames]]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        spec = random_scene(generator)
        yield spec, _video(spec, torch.rand(6, generator=generator), size)


@cache
def _sample() -> list[tuple[SceneSpec, Frames]]:
    return list(_scenes(100, 11, 64))


def _one(prompt: str, size: int = 64, speed: float = 1.0) -> Frames:
    return _video(parse_prompt(prompt), torch.tensor([0.3, 0.4, 0.1, 0.6, 0.7, 0.9]), size, speed)


def _worn(frames: Frames, rng: np.random.Generator, noise: float = 6, shift: float = 12, fade: float = 0.92) -> Frames:
    """The frames with a mild blur, noise, and a colour shift and loss of contrast of the whole video."""
    worn: NDArray[Any] = frames.astype(np.float32)
    for axis in (1, 2):
        before, after = np.roll(worn, 1, axis), np.roll(worn, -1, axis)
        worn = (before + 2 * worn + after) / 4
    worn = 128 + fade * (worn - 128) + rng.uniform(-shift, shift, 3) + rng.normal(0, noise, worn.shape)
    return worn.clip(0, 255).round().astype(np.uint8)


@pytest.mark.parametrize(("size", "count"), [(64, 200), (128, 60)])
def test_ground_truth_is_right(size: int, count: int) -> None:
    specs, verdicts = zip(*((spec, judge(frames, spec)) for spec, frames in _scenes(count, 5, size)), strict=True)
    shares = summarize(chain(*verdicts))
    assert shares["objects"] == sum(len(spec.objects) for spec in specs)
    assert shares["color"] >= 0.99, shares
    assert shares["shape"] >= 0.98, shares
    assert shares["motion"] >= 0.98, shares
    assert shares["background"] == 1


def test_worn_ground_truth_is_still_right() -> None:
    rng = np.random.default_rng(3)
    shares = summarize(v for spec, frames in _sample() for v in judge(_worn(frames, rng), spec))
    assert min(shares["color"], shares["shape"], shares["motion"]) >= 0.95, shares


@pytest.mark.parametrize("field", ["color", "shape", "motion"])
def test_a_wrong_word_is_found_and_the_others_stay_right(field: str) -> None:
    rng = np.random.default_rng(4)
    found, others = [], []
    for spec, frames in _sample():
        for i, obj in enumerate(spec.objects):
            taken = {getattr(obj, field)} | ({o.color for o in spec.objects} if field == "color" else set())
            words = {"color": tuple(COLORS), "shape": SHAPES, "motion": MOTIONS}[field]
            wrong = replace(obj, **{field: rng.choice([w for w in words if w not in taken])})
            verdict = judge(frames, replace(spec, objects=(*spec.objects[:i], wrong, *spec.objects[i + 1 :])))[i]
            found.append(not getattr(verdict, field))
            others += [getattr(verdict, other) for other in ("shape", "motion") if other != field]
    assert np.mean(found) >= 0.95
    if field != "color":  # an object that is not there has no shape either
        assert np.mean(others) >= 0.95


def test_other_prompts_are_right_only_by_chance() -> None:
    sample = _sample()
    verdicts = [v for (spec, _), (_, frames) in pairwise(sample) for v in judge(frames, spec)]
    shares = summarize(verdicts)
    limits = {"color": 0.2, "shape": 0.3, "motion": 0.15, "all": 0.02}
    assert all(shares[name] < limit for name, limit in limits.items()), shares


def _words(verdict: Verdict) -> tuple[bool, bool, bool]:
    return verdict.color, verdict.shape, verdict.motion


@pytest.mark.parametrize("motion", ["slides left", "slides down", "orbits clockwise"])
@pytest.mark.parametrize(("speed", "right"), [(0.6, False), (0.85, True), (1.15, True), (1.5, False), (-1.0, False)])
def test_speed_and_direction_count(motion: str, speed: float, right: bool) -> None:
    prompt = f"a red circle {motion}"
    (verdict,) = judge(_one(prompt, speed=speed), parse_prompt(prompt))
    assert _words(verdict) == (True, True, right)
    if right:
        assert verdict.speed == pytest.approx(speed, abs=0.05)


def test_a_video_that_stands_still_is_still() -> None:
    for motion in MOTIONS:
        prompt = f"a green square {motion}"
        frames = np.repeat(_one(prompt)[:1], FRAMES, axis=0)
        (verdict,) = judge(frames, parse_prompt(prompt))
        assert verdict.seen_motion == "stays still"
        assert verdict.motion == (motion == "stays still")


def test_an_object_that_is_missing_or_dissolves_has_nothing_right() -> None:
    spec = parse_prompt("a blue circle bounces and a large orange square slides up")
    alone = _video(parse_prompt("a large orange square slides up"), torch.rand(6), 64)
    blue = judge(alone, spec)[0]
    assert _words(blue) == (False, False, False)
    assert (blue.seen_shape, blue.seen_motion, blue.seen_colors) == ("none", "gone", "orange")

    frames = _one("a blue circle bounces")
    frames[FRAMES // 2 :] = frames[0, 0, 0]
    (half,) = judge(frames, parse_prompt("a blue circle bounces"))
    assert (half.color, half.motion) == (False, False)


def test_a_colour_outside_the_prompt_counts_against_all() -> None:
    frames = _one("a blue circle stays still and a red square pulses")
    (verdict,) = judge(frames, parse_prompt("a blue circle stays still"))
    assert _words(verdict) == (False, True, True)
    assert "red" in verdict.seen_colors
    assert verdict.foreign > 0.01


def test_a_wrong_size_is_a_wrong_area() -> None:
    (verdict,) = judge(_one("a large red square stays still"), parse_prompt("a small red square stays still"))
    assert _words(verdict) == (False, True, True)
    assert verdict.area > 3


def test_a_grey_object_is_no_colour_and_noise_is_no_object() -> None:
    spec = parse_prompt("a red circle stays still")
    grey = _one("a red circle stays still")
    grey[np.abs(grey.astype(int) - COLORS["red"]).sum(-1) < 50] = (128, 128, 128)
    assert not judge(grey, spec)[0].color
    noise = np.random.default_rng(0).integers(0, 256, (FRAMES, 64, 64, 3), dtype=np.uint8)
    assert _words(judge(noise, spec)[0]) == (False, False, False)
    empty = np.full((FRAMES, 64, 64, 3), 20, np.uint8)
    assert _words(judge(empty, spec)[0]) == (False, False, False)


def test_the_background_is_told_apart() -> None:
    frames = _one("a red circle stays still on a light background")
    (verdict,) = judge(frames, parse_prompt("a red circle stays still on a dark background"))
    assert not verdict.background
    assert _words(verdict) == (True, True, True)


@pytest.mark.parametrize("count", [1, 2, 5, 16])
def test_short_videos_have_their_colour_judged(count: int) -> None:
    (verdict,) = judge(_one("a purple triangle orbits clockwise")[:count], parse_prompt("a purple triangle pulses"))
    assert _words(verdict) == (True, True, False)


def test_it_says_the_same_twice_and_leaves_the_frames_alone() -> None:
    spec, frames = _sample()[0]
    before = frames.copy()
    assert judge(frames, spec) == judge(frames, spec)
    assert np.array_equal(frames, before)


def test_what_cannot_be_judged_is_refused() -> None:
    spec = parse_prompt("a red circle bounces")
    for frames in (np.zeros((4, 64, 64, 3), np.float32), np.zeros((64, 64, 3), np.uint8), _one(spec.prompt())[:0]):
        for look in (lambda frames: judge(frames, spec), palette, describe):
            with pytest.raises(ValueError, match="uint8"):
                look(frames)
    with pytest.raises(ValueError, match="one colour"):
        judge(_one(spec.prompt()), parse_prompt("a red circle bounces and a red square pulses"))


def test_summary_of_nothing_is_not_a_number() -> None:
    assert summarize([])["objects"] == 0
    assert np.isnan(summarize([])["color"])
