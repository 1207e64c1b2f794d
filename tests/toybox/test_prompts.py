"""The grammar: every scene has a sentence that reads back as it, and every other sentence is refused by name."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from causalrope_sp.errors import CausalRopeError, PromptError
from causalrope_sp.toybox.prompts import (
    BACKGROUNDS,
    COLORS,
    MOTIONS,
    SHAPES,
    SIZES,
    ObjectSpec,
    SceneSpec,
    parse_prompt,
)
from causalrope_sp.toybox.scenes import random_scene

objects = st.builds(
    ObjectSpec,
    size=st.sampled_from(SIZES),
    color=st.sampled_from(list(COLORS)),
    shape=st.sampled_from(SHAPES),
    motion=st.sampled_from(MOTIONS),
)
scenes = st.builds(
    SceneSpec,
    objects=st.lists(objects, min_size=1, max_size=2).map(tuple),
    background=st.sampled_from(list(BACKGROUNDS)),
)
GRAMMAR_WORDS = (*COLORS, *SHAPES, *MOTIONS)


@given(scenes)
def test_every_scene_round_trips(scene: SceneSpec) -> None:
    assert parse_prompt(scene.prompt()) == scene


@given(scenes, st.data())
def test_case_spaces_commas_and_stops_do_not_matter(scene: SceneSpec, data: st.DataObject) -> None:
    words = scene.prompt().split()
    gaps = data.draw(
        st.lists(st.sampled_from([" ", "  ", "\t", "\n", ", ", ". "]), min_size=len(words), max_size=len(words))
    )
    loud = data.draw(st.lists(st.booleans(), min_size=len(words), max_size=len(words)))
    text = "".join(gap + (word.upper() if up else word) for gap, word, up in zip(gaps, words, loud, strict=True))
    assert parse_prompt(text + ".") == scene


@given(objects)
def test_the_background_is_dark_unless_said(spec: ObjectSpec) -> None:
    phrase = SceneSpec((spec,)).prompt().removesuffix(" on a dark background")
    assert parse_prompt(phrase) == SceneSpec((spec,), "dark")
    assert parse_prompt(f"{phrase} on a light background").background == "light"


def test_articles_may_be_left_out() -> None:
    expected = parse_prompt("a red circle bounces and a blue square pulses on a light background")
    assert parse_prompt("Red circle bounces and the blue square pulses on light background.") == expected


def test_an_may_stand_before_a_vowel() -> None:
    assert parse_prompt("an orange circle pulses and an orange square bounces") == parse_prompt(
        "a orange circle pulses and a orange square bounces"
    )


@given(scenes, st.from_regex(r"[a-z]{2,9}", fullmatch=True), st.data())
def test_an_unknown_word_is_named_and_the_words_are_listed(scene: SceneSpec, word: str, data: st.DataObject) -> None:
    words = scene.prompt().split()
    stranger = f"{word}qx"  # no word of the grammar ends so
    place = data.draw(st.integers(0, len(words) - 1))
    words[place] = stranger
    with pytest.raises(PromptError) as error:
        parse_prompt(" ".join(words))
    message = str(error.value)
    assert repr(stranger) in message
    assert all(known in message for known in GRAMMAR_WORDS)
    assert "\n" not in message


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        "   ",
        "a",
        "a circle red bounces",
        "a red circle",
        "a red bounces",
        "a bounces red circle",
        "a red small circle bounces",
        "a small large red circle bounces",
        "a red circle slides",
        "a red circle orbits left",
        "a red circle slides clockwise",
        "a red circle bounces pulses",
        "a red circle stays",
        "a red circle still",
        "a red circle bounces on a red background",
        "a red circle bounces on a background",
        "on a dark background a red circle bounces",
        "a red circle bounces and",
        "a red circle bounces a blue square pulses",
        "a red circle bounces and a blue square pulses and a green square pulses",
        "a red circle bounces on a dark background and a blue square pulses",
        "a dark circle bounces",
        "a red light bounces",
    ],
)
def test_words_out_of_place_are_refused_in_one_line(prompt: str) -> None:
    with pytest.raises(PromptError) as error:
        parse_prompt(prompt)
    assert isinstance(error.value, CausalRopeError)
    assert all(known in str(error.value) for known in GRAMMAR_WORDS)
    assert len(str(error.value).splitlines()) == 1


@given(scenes)
def test_the_order_of_the_words_says_which_object_they_are_of(scene: SceneSpec) -> None:
    colors = [o.color for o in scene.objects]
    swapped = tuple(replace(o, color=c) for o, c in zip(scene.objects, reversed(colors), strict=True))
    assert parse_prompt(replace(scene, objects=swapped).prompt()) == replace(scene, objects=swapped)
    first = scene.objects[0]
    with pytest.raises(PromptError, match=r"is no (COLOR|SHAPE|MOTION|background) in|cannot read"):
        parse_prompt(scene.prompt().replace(f"{first.color} {first.shape}", f"{first.shape} {first.color}", 1))


@given(st.integers(0, 2**31))
def test_random_scenes_are_of_the_grammar(seed: int) -> None:
    scene = random_scene(torch.Generator().manual_seed(seed))
    assert parse_prompt(scene.prompt()) == scene
    assert len({o.color for o in scene.objects}) == len(scene.objects) in (1, 2)
