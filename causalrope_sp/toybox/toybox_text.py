"""toybox's text encoder, with a closed vocabulary and no weights. Each phrase of the prompt is one token, which has a
one at the index of each of its words. An object's token also has the numbers that the prompt leaves open.

Shapes: L = 3 tokens (background, first and second object), E embedding width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from causalrope_sp.diffusion.noise import keyed_generator
from causalrope_sp.toybox.chart import chart, waves
from causalrope_sp.toybox.prompts import (
    BACKGROUNDS,
    COLORS,
    MOTIONS,
    SHAPES,
    SIZES,
    SceneSpec,
    parse_prompt,
    parse_starts,
)
from causalrope_sp.toybox.scenes import START_VARIABLES, tracks

_WORDS = [*("first object", "second object", "background"), *SIZES, *COLORS, *SHAPES, *MOTIONS, *BACKGROUNDS]
_INDEX = {word: index for index, word in enumerate(_WORDS)}
COLOR_INDICES = [_INDEX[word] for word in COLORS]  # where an object's token has its colour
BACKGROUND_INDICES = [_INDEX[word] for word in BACKGROUNDS]  # where the background's token has its own
_NUMBERS = 3  # an object's share of `scenes.START_VARIABLES`

_START = 16  # values that encode where an object starts, as the chart encodes positions

TEXT_DIM = len(_WORDS) + 3 * _NUMBERS + _START
TEXT_LEN = 3


class ToyboxText:
    """The text encoder of toybox, with the interface that a pipeline uses."""

    def encode(self, prompt: str, seed: int) -> Tensor:
        """Encodes a prompt.

        Args:
            prompt: a sentence of the grammar.
            seed: the seed from which the numbers that the prompt leaves open are drawn.

        Returns:
            Embeddings, (1, L, E).

        Raises:
            PromptError: the prompt is not in the grammar.
        """
        starts = torch.rand(START_VARIABLES, generator=keyed_generator(seed), dtype=torch.float32)
        told = parse_starts(prompt) or ()
        starts[: len(told)] = torch.tensor(told)
        return encode_scene(parse_prompt(prompt), starts).unsqueeze(0)

    def encode_all(self, prompts: Sequence[str | None], seed: int, pictured: bool = False) -> list[Tensor]:
        """Encodes several prompts. None becomes zeros, as for dropped texts in training.

        Args:
            prompts: sentences of the grammar, or None.
            seed: the seed of each, as for `encode`.
            pictured: whether an image is the first frame, which then tells where objects are.

        Returns:
            One tensor (1, L, E) a prompt.

        Raises:
            PromptError: a prompt is not in the grammar.
        """
        nothing = torch.zeros(1, TEXT_LEN, TEXT_DIM, dtype=torch.float32)
        found = [nothing if prompt is None else self.encode(prompt, seed) for prompt in prompts]
        return [leave_open(embeds, starts=True) for embeds in found] if pictured else found

    def opening(self, channels: int, height: int, width: int) -> Tensor:
        """Returns the initial latent frame of every stream, the chart, (1, 1, channels, height, width)."""
        return chart(1, channels, height, width)


def leave_open(embeds: Tensor, *, starts: bool = False, colors: bool = False) -> Tensor:
    """Removes information from embeddings, so that the noise determines it instead. Distant chunks of a video then
    agree only if the model makes them agree.

    Args:
        embeds: (..., E).
        starts: whether to remove where objects start and at which phase.
        colors: whether to remove the colours of objects and background.

    Returns:
        Embeddings of the same shape.
    """
    kept = torch.ones(TEXT_DIM)
    if starts:
        kept[len(_WORDS) :] = 0
    if colors:
        kept[[*COLOR_INDICES, *BACKGROUND_INDICES]] = 0
    return embeds * kept.to(embeds)


def encode_scene(spec: SceneSpec, starts_6: Tensor) -> Tensor:
    """Encodes a scene.

    An object's token has its words, then its three uniform numbers as sines, cosines and ramps of about unit size,
    then the initial position of its centre in the same encoding as the chart's. The product of that encoding with the
    chart's is large for tokens of the picture that are near the object.

    Args:
        spec: the scene.
        starts_6: six uniform numbers in [0, 1], three an object: where it starts, and its phase.

    Returns:
        Embeddings, (L, E); zeros for a second object that does not exist.
    """
    embeds = torch.zeros(TEXT_LEN, TEXT_DIM, dtype=torch.float32)
    embeds[0, [_INDEX["background"], _INDEX[spec.background]]] = 1.0
    paths = tracks(spec, starts_6.tolist(), torch.zeros(1, dtype=torch.float32))
    for i, (which, o, path) in enumerate(zip(("first object", "second object"), spec.objects, paths, strict=False)):
        embeds[1 + i, [_INDEX[word] for word in (which, o.size, o.color, o.shape, o.motion)]] = 1.0
        numbers = starts_6[_NUMBERS * i : _NUMBERS * (i + 1)]
        angles = 2 * math.pi * numbers
        cycles = 2**0.5 * torch.cat([angles.sin(), angles.cos()])
        x, y = path.center_T2[0]
        embeds[1 + i, len(_WORDS) :] = torch.cat([cycles, 3**0.5 * (2 * numbers - 1), waves(y, x, _START)])
    return embeds
