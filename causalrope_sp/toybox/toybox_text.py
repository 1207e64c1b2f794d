"""toybox's text encoder: no weights, a closed vocabulary. Each phrase of the prompt is one token, the union of its
words as ones at their places; an object's token also carries what the prompt leaves open of it.

Shapes: L = 3 tokens (background, first and second object), E embedding width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from causalrope_sp.diffusion.noise import keyed_generator
from causalrope_sp.toybox.chart import chart, waves
from causalrope_sp.toybox.prompts import BACKGROUNDS, COLORS, MOTIONS, SHAPES, SIZES, SceneSpec, parse_prompt
from causalrope_sp.toybox.scenes import PLACE_VARIABLES, tracks

_WORDS = [*("first object", "second object", "background"), *SIZES, *COLORS, *SHAPES, *MOTIONS, *BACKGROUNDS]
_PLACE = {word: place for place, word in enumerate(_WORDS)}
_NUMBERS = 3  # an object's share of `scenes.PLACE_VARIABLES`

_START = 16  # the waves, as the chart's, of where an object starts

TEXT_DIM = len(_WORDS) + 3 * _NUMBERS + _START
TEXT_LEN = 3


class ToyboxText:
    """What a pipeline asks of a text encoder: embeddings of a prompt, and the frames that a stream opens with."""

    def encode(self, prompt: str, seed: int) -> Tensor:
        """(1, L, E). What the prompt leaves open is drawn from the seed.

        Raises:
            PromptError: the prompt is outside the grammar.
        """
        places = torch.rand(PLACE_VARIABLES, generator=keyed_generator(seed))
        return encode_scene(parse_prompt(prompt), places).unsqueeze(0)

    def encode_all(self, prompts: Sequence[str | None], seed: int) -> list[Tensor]:
        """Those of several prompts. None is no text: zeros, which the weights that ship have not been trained on."""
        nothing = torch.zeros(1, TEXT_LEN, TEXT_DIM)
        return [nothing if prompt is None else self.encode(prompt, seed) for prompt in prompts]

    def opening(self, channels: int, height: int, width: int) -> Tensor:
        """The given latent frames of every stream, (1, 1, channels, height, width): the chart."""
        return chart(1, channels, height, width)


def leave_open(embeds: Tensor, *, places: bool = False, colors: bool = False) -> Tensor:
    """Embeddings (..., E) that do not say where objects start and at which phase, or which colours they and the
    background have: that is left to the noise. Chunks far apart then agree only if something makes them."""
    said = torch.ones(TEXT_DIM)
    if places:
        said[len(_WORDS) :] = 0
    if colors:
        said[[_PLACE[word] for word in (*COLORS, *BACKGROUNDS)]] = 0
    return embeds * said.to(embeds)


def encode_scene(spec: SceneSpec, places_6: Tensor) -> Tensor:
    """The embeddings of a scene, (L, E), zeros where there is no second object.

    The six uniform numbers say where the objects start and at which phase; each is given as a sine, a cosine and a
    ramp, of about unit size. The place where an object's centre starts follows, in the same waves as the chart's, so
    that a token of the picture finds what is near it by a product of the two.
    """
    embeds = torch.zeros(TEXT_LEN, TEXT_DIM)
    embeds[0, [_PLACE["background"], _PLACE[spec.background]]] = 1.0
    paths = tracks(spec, places_6.tolist(), torch.zeros(1))
    for i, (which, o, path) in enumerate(zip(("first object", "second object"), spec.objects, paths, strict=False)):
        embeds[1 + i, [_PLACE[word] for word in (which, o.size, o.color, o.shape, o.motion)]] = 1.0
        numbers = places_6[_NUMBERS * i : _NUMBERS * (i + 1)]
        angles = 2 * math.pi * numbers
        cycles = 2**0.5 * torch.cat([angles.sin(), angles.cos()])
        x, y = path.center_T2[0]
        embeds[1 + i, len(_WORDS) :] = torch.cat([cycles, 3**0.5 * (2 * numbers - 1), waves(y, x, _START)])
    return embeds
