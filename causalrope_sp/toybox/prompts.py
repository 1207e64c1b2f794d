"""The toybox grammar: one or two objects, each with a colour, a shape and a motion.

a [small|large] COLOR SHAPE MOTION [and a [small|large] COLOR SHAPE MOTION] [on a dark|light background] [at N N N ...]

What a prompt leaves open, three numbers an object, may be given in hundredths: where it starts, and its phase.
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
    "a [small|large] COLOR SHAPE MOTION [and a [small|large] COLOR SHAPE MOTION] [on a dark|light background] "
    "[at N N N, or six of them]; "
    f"COLOR: {', '.join(COLORS)}; SHAPE: {', '.join(SHAPES)}; MOTION: {', '.join(MOTIONS)}"
)

_OBJECT = r"(?:(?:an?|the) )?(?:(small|large) )?(?!(?:an?|the) )([a-z]+) ([a-z]+) ([a-z]+(?: [a-z]+)??)"
_PROMPT = re.compile(rf"{_OBJECT}(?: and {_OBJECT})?(?: on (?:an? |the )?([a-z]+) background)?")
_STARTS = re.compile(r"(.*?) at\b ?(.*)")
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
    words, _ = _split(prompt)
    unknown = [word for word in words.split() if word not in _WORDS]
    if unknown:
        raise PromptError(f"unknown word {unknown[0]!r} in the prompt {prompt!r}; toybox knows: {GRAMMAR}")
    match = _PROMPT.fullmatch(words)
    if match is None:
        raise PromptError(
            f"cannot read the prompt {prompt!r}: an object is a COLOR, a SHAPE and a MOTION; toybox knows: {GRAMMAR}"
        )
    *fields, background = match.groups()
    phrases = [fields[:4]] if fields[5] is None else [fields[:4], fields[4:]]
    background = background or "dark"
    for _size, color, shape, motion in phrases:
        for kind, word, known in (
            ("COLOR", color, COLORS),
            ("SHAPE", shape, SHAPES),
            ("MOTION", motion, MOTIONS),
            ("background", background, BACKGROUNDS),
        ):
            if word not in known:
                raise PromptError(f"{word!r} is no {kind} in the prompt {prompt!r}; toybox knows: {GRAMMAR}")
    return SceneSpec(tuple(ObjectSpec(s or "medium", c, sh, m) for s, c, sh, m in phrases), background)


def parse_starts(prompt: str) -> tuple[float, ...] | None:
    """Reads where a prompt says that its objects start.

    Args:
        prompt: a sentence of the grammar.

    Returns:
        Three numbers in [0, 1) an object, see `scenes.START_VARIABLES`; None if the prompt says nothing of it.

    Raises:
        PromptError: there are not three numbers for each object.
    """
    _, starts = _split(prompt)
    objects = len(parse_prompt(prompt).objects)
    if starts is not None and len(starts) != 3 * objects:
        raise PromptError(f"the prompt {prompt!r} has {len(starts)} numbers after 'at', and needs {3 * objects}")
    return starts


def _split(prompt: str) -> tuple[str, tuple[float, ...] | None]:
    """The words of a prompt and its numbers."""
    words = re.sub(r"[\s,.]+", " ", prompt.lower()).strip()
    match = _STARTS.fullmatch(words)
    if match is None:
        return words, None
    numbers = match[2].split()
    if len(numbers) not in (3, 6) or not all(re.fullmatch("[0-9]{1,2}", number) for number in numbers):
        raise PromptError(
            "after 'at', which comes last, an object has three whole numbers from 0 to 99 (along its path, across it, "
            f"phase); not {match[2]!r}"
        )
    return match[1], tuple((int(number) + 0.5) / 100 for number in numbers)
