"""toybox's text encoder: no weights, a closed vocabulary. Each phrase of the prompt is one token, the union of its
words as ones at their places."""

from __future__ import annotations

import torch
from torch import Tensor

from causalrope_sp.toybox.prompts import BACKGROUNDS, COLORS, MOTIONS, SHAPES, SIZES, SceneSpec, parse_prompt

_WORDS = [
    *("first object", "second object", "background"),
    *SIZES,
    *COLORS,
    *SHAPES,
    *MOTIONS,
    *BACKGROUNDS,
]
_PLACE = {word: place for place, word in enumerate(_WORDS)}

TEXT_DIM = len(_WORDS)
TEXT_LEN = 3


def encode_scene(spec: SceneSpec) -> Tensor:
    """The embeddings of a parsed prompt, (TEXT_LEN, TEXT_DIM), zeros where there is no second object."""
    objects = [
        (which, o.size, o.color, o.shape, o.motion)
        for which, o in zip(("first object", "second object"), spec.objects, strict=False)
    ]
    embeds = torch.zeros(TEXT_LEN, TEXT_DIM)
    for token, words in enumerate([("background", spec.background), *objects]):
        for word in words:
            embeds[token, _PLACE[word]] = 1.0
    return embeds


def encode_prompt(prompt: str) -> Tensor:
    """The embeddings of a prompt, (1, TEXT_LEN, TEXT_DIM).

    Raises:
        PromptError: the prompt is outside the grammar.
    """
    return encode_scene(parse_prompt(prompt)).unsqueeze(0)
