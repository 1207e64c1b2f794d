"""The text of a scene is found from its frames."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from causalrope_sp import CausalVideoPipeline, ConfigError, PromptError
from causalrope_sp.compression import find_prompt
from causalrope_sp.toybox.described import describe
from causalrope_sp.toybox.prompts import parse_prompt, parse_starts
from causalrope_sp.toybox.scenes import render
from causalrope_sp.toybox.toybox_text import ToyboxText

SCENES = [
    "a small red square stays still on a dark background at 67 26 50",
    "a large blue triangle slides up on a light background at 20 40 50",
    "a purple circle slides left and a small red square slides right on a dark background at 45 24 50 71 18 50",
    "a large red circle pulses and a yellow square slides down on a dark background at 33 38 86 24 7 50",
]


def video(prompt: str, frames: int = 49) -> np.ndarray:
    starts = torch.full((1, 6), 0.5)
    told = parse_starts(prompt) or ()
    starts[0, : len(told)] = torch.tensor(told)
    pixels = render([parse_prompt(prompt)], starts, torch.arange(frames).float(), 64)[0]
    return pixels.movedim(0, -1).mul(255).round().byte().numpy()


@pytest.mark.parametrize("prompt", SCENES[1:3])
def test_the_text_of_a_scene_is_found(prompt: str) -> None:
    """Words are those of the scene; what its motion shows of the starts is within two hundredths."""
    found = find_prompt(CausalVideoPipeline.from_pretrained("toybox"), video(prompt))
    assert parse_prompt(found) == parse_prompt(prompt)
    shown = video(found).astype(float)
    assert np.abs(shown - video(prompt)).mean() < 6


def test_a_video_that_is_no_scene_is_refused() -> None:
    pipe = CausalVideoPipeline.from_pretrained("toybox")
    with pytest.raises(PromptError, match="has 0 colours"):
        find_prompt(pipe, np.zeros((9, 64, 64, 3), np.uint8))
    with pytest.raises(PromptError, match="one or two objects"):
        find_prompt(pipe, np.random.default_rng(0).integers(0, 256, (9, 64, 64, 3)).astype(np.uint8))
    pipe.text = object()  # type: ignore[assignment]
    with pytest.raises(ConfigError, match="scenes of toybox alone"):
        find_prompt(pipe, video(SCENES[0]))


def test_measuring_tells_all_but_the_shape() -> None:
    for prompt in SCENES:
        words = {sentence.partition(" at ")[0] for sentence in describe(video(prompt))}
        assert prompt.partition(" at ")[0] in words


def test_a_prompt_says_where_objects_start() -> None:
    text = ToyboxText()
    plain = "a red circle slides right"
    one, same = text.encode(f"{plain}, at 1 2 3", 0), text.encode(f"{plain} at 01 02 03", 9)
    other = text.encode(f"{plain} at 50 2 3", 0)
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert parse_starts(plain) is None
    assert parse_starts(f"{plain} at 0 50 99") == (0.005, 0.505, 0.995)
    for wrong in (f"{plain} at 1 2 3 4 5 6", f"{plain} at 1 2", f"{plain} at 1 2 300", f"{plain} at"):
        with pytest.raises(PromptError):
            text.encode(wrong, 0)
