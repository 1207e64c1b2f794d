"""Latents of models of published width with random weights and few layers, with policies and with masks in their place.

A policy and its emulation differ by rounding alone: in float64, 1e-9 of their norm.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from heads import STATIC, split
from masked_attention import Rule, attending, of_frames, windows
from printed import stop
from torch import Tensor

from causalrope_sp import Chunk, LatentGrid, SamplerConfig, StreamConfig, sample_chunks
from causalrope_sp.config import PRESETS
from causalrope_sp.diffusion.noise import seeded_noise
from causalrope_sp.models.causal_dit import CausalDiT
from causalrope_sp.sampling.similar_frames import Choice, SimilarFrames

LAYERS, FFN, TEXT = 2, 256, 64
GRID = LatentGrid(1, 2)
STREAM = StreamConfig(window=9, sink=1, chunk_frames=3)
SHARE = sum(STATIC) / (12 * len(STATIC))  # of heads that are static
SHORT, MIDDLE = 5, 7  # windows in latent frames: the sink, the newest frame and the chunk; two frames more
FRAMES, STEPS = 12, (1000.0, 750.0)
LARGEST_ERROR = 1e-9  # of latents in float64


def policies(heads: int) -> dict[str, StreamConfig]:
    """The streams that are compared, by name."""
    windows = replace(STREAM, heads=split(LAYERS, heads, SHARE, static=SHORT, dynamic=MIDDLE))
    similar = replace(STREAM, similar_frames=2)
    every = replace(similar, heads=split(LAYERS, heads, SHARE, static=SHORT), cache="int8")
    return {"windows": windows, "similar_frames=2": similar, "windows, similar_frames=2, int8": every}


@contextmanager
def noted_choices() -> Iterator[dict[Chunk, Choice]]:
    """Notes which frames are chosen by similarity, by chunk, then layer and head."""
    noted, choose = {}, SimilarFrames._choice

    def note(self: SimilarFrames, chunk: Chunk, *rest: Any) -> Choice | None:
        choice = choose(self, chunk, *rest)
        if choice is not None:
            noted[chunk] = choice
        return choice

    with patch.object(SimilarFrames, "_choice", note):
        yield noted


def emulation(stream: StreamConfig, heads: int, chosen: dict[Chunk, Choice]) -> Rule:
    """The rule of a policy: windows of heads in all passes, and after a chunk's first pass the frames that the other
    heads chose for it."""
    within = None if stream.heads is None else windows(stream.heads, STREAM.window or 0, STREAM.sink)
    begun: set[tuple[int, Chunk]] = set()

    def rule(layer: int, chunk: Chunk, frames: Sequence[int], scores_BHTL: Tensor) -> Tensor:
        later = (layer, chunk) in begun and chunk in chosen
        choice = chosen[chunk][layer] if later else {}
        begun.add((layer, chunk))
        seen_HN = [[frame in choice.get(head, frames) for frame in frames] for head in range(heads)]
        seen = of_frames(torch.tensor(seen_HN), scores_BHTL)
        return seen if within is None else seen & within(layer, chunk, frames, scores_BHTL)

    return rule


def latents(model: CausalDiT, stream: StreamConfig) -> Tensor:
    config = model.config
    text = torch.zeros(1, TEXT, TEXT, dtype=torch.float64)
    noise = seeded_noise(0, (1, config.in_channels, 2 * GRID.rows, 2 * GRID.columns))
    made = sample_chunks(model, text, noise, GRID, FRAMES, stream=stream, sampler=SamplerConfig(STEPS))
    return torch.cat([each.latents for each in made], 1)


def apart(x: Tensor, y: Tensor) -> float:
    """The relative distance of x from y."""
    return float((x - y).norm() / y.norm())


def random_rows(name: str) -> list[dict[str, Any]]:
    """Runs every policy and its emulation on a model of the width of a preset.

    Returns:
        For every policy its error and how much it changes the latents.
    """
    torch.manual_seed(0)
    config = replace(PRESETS[name], num_layers=LAYERS, ffn_dim=FFN, text_dim=TEXT, text_len=TEXT)
    model = CausalDiT(config).double().eval()
    dense, rows = latents(model, STREAM), []
    for policy, stream in policies(config.num_heads).items():
        with noted_choices() as chosen:
            found = latents(model, stream)
        plain = replace(stream, heads=None, similar_frames=None)
        with attending(emulation(stream, config.num_heads, chosen)) as keys:
            error = apart(found, latents(model, plain))
        if error > LARGEST_ERROR:
            stop(f"{name}, {policy}: the latents differ from those of masks by {error:.1e}: nothing is reported")
        rows.append({"model": name, "policy": policy, "error": error, "change": apart(found, dense)})
        rows[-1]["keys"] = keys[1] / keys[0]
    return rows
