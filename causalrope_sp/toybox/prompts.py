"""The toybox grammar: one or two objects, each with a colour, a shape and a motion.

a [small|large] COLOR SHAPE MOTION [and a [small|large] COLOR SHAPE MOTION] [on a dark|light background]
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from causalrope_sp.errors import PromptError

SIZES = ("small", "medium", "large")  # "medium" is the size of an object without a size word
COLORS = {
    "red": (220, 40, 40),
    "green": (40, 180, 60),
    "blue": (50, 90, 220),
    "yellow": (230, 210, 50),
    "purple": (150, 60, 200),
    "orange": (240, 140, 30),
}
SHAPES = ("circle", "square", "triangle")
MOTIONS = (
    "slides left",
    "slides right",
    "slides up",
    "slides down",
    "bounces",
    "orbits clockwise",
    "orbits counterclockwise",
    "pulses",
    "stays still",
)
BACKGROUNDS = {"dark": (18, 18, 24), "light": (236, 236, 230)}  # dark unless the prompt says otherwise

GRAMMAR = (
    "a [small|large] COLOR SHAPE MOTION [and a [small|large] COLOR SHAPE MOTION] [on a dark|light background]; "
    f"COLOR: {', '.join(COLORS)}; SHAPE: {', '.join(SHAPES)}; MOTION: {', '.join(MOTIONS)}"
)

_OBJECT = r"(?:(?:an?|the) )?(?:(small|large) )?([a-z]+) ([a-z]+) ([a-z]+(?: [a-z]+)??)"
_PROMPT = re.compile(rf"{_OBJECT}(?: and {_OBJECT})?(?: on (?:an? |the )?([a-z]+) background)?")
_WORDS = frozenset(
    ["a", "an", "the", "and", "on", "background", "small", "large", *COLORS, *SHAPES, *BACKGROUNDS]
    + [word for motion in MOTIONS for word in motion.split()]
)


@dataclass(frozen=True)
class ObjectSpec:
    """One object of a prompt; every field is a word or words of the grammar."""

    size: str
    color: str
    shape: str
    motion: str


@dataclass(frozen=True)
class SceneSpec:
    """The scene of a prompt: one or two objects on a background."""

    objects: tuple[ObjectSpec, ...]
    background: str = "dark"

    def prompt(self) -> str:
        """Returns the sentence that parses to this scene."""
        phrases = [
            "a " + " ".join(w for w in (o.size, o.color, o.shape, o.motion) if w != "medium") for o in self.objects
        ]
        return " and ".join(phrases) + f" on a {self.background} background"


def parse_prompt(prompt: str) -> SceneSpec:
    """Parses one sentence of the grammar. Case, commas, full stops, repeated spaces and articles are ignored.

    Args:
        prompt: the sentence.

    Returns:
        The scene.

    Raises:
        PromptError: a word is not in the grammar, or the order of the words is not.
    """
    words = re.sub(r"[\s,.]+", " ", prompt.lower()).strip()
    unknown = [word for word in words.split() if word not in _WORDS]
    if unknown:
        raise PromptError(f"unknown word {unknown[0]!r} in the prompt {prompt!r}; toybox knows: {GRAMMAR}")
    match = _PROMPT.fullmatch(words)
    if match is None:
        raise PromptError(f"cannot read the prompt {prompt!r}; toybox knows: {GRAMMAR}")
    *fields, background = match.groups()
    phrases = [fields[:4]] if fields[5] is None else [fields[:4], fields[4:]]
    background = background or "dark"
    for _size, color, shape, motion in phrases:
        for word, known in ((color, COLORS), (shape, SHAPES), (motion, MOTIONS), (background, BACKGROUNDS)):
            if word not in known:
                raise PromptError(
                    f"{word!r} is in the wrong position in the prompt {prompt!r}; toybox knows: {GRAMMAR}"
                )
    return SceneSpec(tuple(ObjectSpec(s or "medium", c, sh, m) for s, c, sh, m in phrases), background)
