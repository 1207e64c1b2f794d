"""Teaches a VIN to read before its DiT takes part. A pair that starts together does not learn it: at the noise levels
where a colour is decided, a few tokens in hundreds tell it, faintly.

    places  The text says where objects are: a linear layer on the VIN's places learns how much of a token each object
            covers. No video takes part, and no noise, so that a step learns from many texts. Then places stay as they
            are.
    colors  A linear layer on the first three global tokens names the colours that the text leaves open. Only the noisy
            video tells them. This goes on while the pair is trained.

The linear layers do not ship.

Shapes: B videos, N scenes, F latent frames, O = 2 objects, S tokens a frame, T any tokens, D VIN width, G global
tokens, L text tokens, W text width, X pixels of a picture's width and height.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from toybox_training.batches import Draws
from toybox_training.latents import PIXEL_FRAMES, Latents, encoded_frames
from toybox_training.training import Training

from causalrope_sp.toybox.prompts import SceneSpec
from causalrope_sp.toybox.scenes import covers
from causalrope_sp.toybox.toybox_text import BACKGROUND_INDICES, COLOR_INDICES, leave_open
from causalrope_sp.vin import VideoInterfaceNetwork

from .forward import TogetherForcing, in_bfloat16
from .loop import Report, learn

OBJECTS = 2
SEED = 71_000_000
PLACES = 0.3  # the share of the time in which places are learned
TEXTS, TIMES, LAST = 4, 10, 129  # then a step has so many texts for each video of later steps; their latent frames
OPEN = 0.8  # the share of videos whose text does not name colours
HIGH_NOISE = 0.7  # half of the noise levels are above
MEASURED_AT, MEASURED_FRAMES = (0.8, 0.9, 0.95), 65  # noise levels; latent frames
OF_PLACES = ("vin.frequencies", "vin.embed_place", "vin.embed_text", "vin.text_at_places", "heads.covers")
PIXELS = 8  # of a token's width and height, when its cover is computed


@dataclass(frozen=True)
class Covered:
    """Scenes, and how much of each token each of their objects covers and shows, half precision, (N, F, O, S)."""

    latents: Latents
    shares: Tensor

    @classmethod
    def of(cls, latents: Latents, drawn: list[tuple[list[SceneSpec], Tensor]], rows: int) -> Covered:
        """Computes what objects cover in encoded scenes, which `drawn_scenes` draws; a frame has as many columns of
        tokens as rows."""
        made = [
            _shares(spec, starts, rows)
            for specs, places in drawn
            for spec, starts in zip(specs, places.tolist(), strict=True)
        ]
        return cls(latents, torch.stack(made).to(latents.latents.device))

    def covers(self, picked: Tensor, frames: Sequence[int]) -> Tensor:
        """What each object covers of the tokens of some latent frames, float32, (B, F·S, O)."""
        device = self.shares.device
        chosen = self.shares[picked.to(device).unsqueeze(1), encoded_frames(frames, device)]
        return chosen.transpose(2, 3).flatten(1, 2).float()


class Heads(nn.Module):
    """The linear layers that tell what a VIN has read."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.covers = nn.Linear(dim, OBJECTS)
        self.colors = nn.Linear(dim, len(COLOR_INDICES))
        self.backgrounds = nn.Linear(dim, len(BACKGROUND_INDICES))

    def covers_loss(self, places_BTD: Tensor, covers_BTO: Tensor) -> Tensor:
        """The binary cross-entropy of how much of each token each object covers."""
        return functional.binary_cross_entropy_with_logits(self.covers(places_BTD), covers_BTO)

    def names_loss(self, z_BGD: Tensor, whole_BLW: Tensor) -> Tensor:
        """The mean cross-entropy of the colours of objects, plus that of backgrounds; the texts leave nothing open."""
        background, objects, there = _told(whole_BLW)
        errors = functional.cross_entropy(self.colors(z_BGD[:, :OBJECTS]).transpose(1, 2), objects, reduction="none")
        of_background = functional.cross_entropy(self.backgrounds(z_BGD[:, OBJECTS]), background)
        return (errors * there).sum() / there.sum() + of_background

    def named(self, z_BGD: Tensor, whole_BLW: Tensor) -> float:
        """The share of objects whose colour is named."""
        _, objects, there = _told(whole_BLW)
        right = self.colors(z_BGD[:, :OBJECTS]).argmax(-1) == objects
        return ((right & there).sum() / there.sum()).item()


class Reader(nn.Module):
    """The part of a pair that learns alone."""

    def __init__(self, vin: VideoInterfaceNetwork, heads: Heads) -> None:
        super().__init__()
        self.vin, self.heads = vin, heads


def by_muon(name: str, parameter: nn.Parameter) -> bool:
    """Whether Muon takes a parameter: the matrices of blocks and of what a VIN hands over."""
    blocks = ("blocks.", "asking.", "text_at_places.", "hand_over.")
    return parameter.ndim == 2 and any(part in name for part in blocks) and "modulation" not in name


def draw_length(lengths: dict[int, float], draws: Draws) -> int:
    """Draws a length by its share."""
    return list(lengths)[int(torch.multinomial(torch.tensor(list(lengths.values())), 1, generator=draws.choices))]


def learn_to_read(
    out: Path,
    reader: Reader,
    scenes: Covered,
    held_out: Covered,
    forcing: TogetherForcing,
    lengths: dict[int, float],
    videos: int,
    minutes: float,
    lr: float,
) -> None:
    """Trains a VIN alone for so many minutes, on videos of these lengths with their shares. The reader keeps the
    averaged weights."""

    def of_places(model: Reader, draws: Draws, _: float) -> tuple[Tensor, Report]:
        pick = scenes.latents.draw(TEXTS * videos, draws.choices).to(forcing.device)
        frames = [draws.below(LAST) for _ in range(TIMES)]
        with in_bfloat16(forcing.device):
            places = forcing.places(model.vin, scenes.latents.embeds[pick], [1 + frame for frame in frames])
        return model.heads.covers_loss(places.float(), scenes.covers(pick, frames)), {}

    def of_colors(model: Reader, draws: Draws, _: float) -> tuple[Tensor, Report]:
        frames, pick = draw_length(lengths, draws), scenes.latents.draw(videos, draws.choices)
        times = draws.uniform(videos)
        times = torch.where(draws.which(0.5, videos), HIGH_NOISE + (1 - HIGH_NOISE) * draws.uniform(videos), times)
        z, whole = _read(model, forcing, scenes.latents, pick, frames, times, draws.which(OPEN, videos), draws)
        return model.heads.names_loss(z, whole), {"named": model.heads.named(z, whole)}

    stages = (
        ("places", of_places, partial(_explained, forcing, held_out), PLACES),
        ("colors", of_colors, partial(named, forcing, held_out), 1 - PLACES),
    )
    for name, loss, measure, share in stages:
        for of, parameter in reader.named_parameters():
            parameter.requires_grad_(computes_places(of) == (name == "places"))
        training = Training(reader, out / f"{name}.pt", lr, by_muon, average=0.997)
        averaged = learn(training, share * minutes, SEED, forcing.device, loss, measure)
        reader.load_state_dict(averaged.state_dict())


def computes_places(name: str) -> bool:
    """Whether a parameter of a reader is learned with the places."""
    return name.startswith(OF_PLACES)


@torch.no_grad()
def named(forcing: TogetherForcing, held_out: Covered, reader: Reader) -> Report:
    """The shares of open colours that are named in scenes which are never learned from, by noise level."""
    pick, found = torch.arange(len(held_out.latents.latents)), {}
    everything = torch.ones(len(pick), dtype=torch.bool, device=forcing.device)
    for level in MEASURED_AT:
        draws, times = Draws.seeded(SEED, forcing.device), torch.full((len(pick),), level, device=forcing.device)
        z, whole = _read(reader, forcing, held_out.latents, pick, MEASURED_FRAMES, times, everything, draws)
        found[f"named_{level}"] = reader.heads.named(z, whole)
    return found


@torch.no_grad()
def _explained(forcing: TogetherForcing, held_out: Covered, reader: Reader) -> Report:
    """How much of the variance of covers is explained in scenes which are never learned from."""
    pick, keyframes = torch.arange(len(held_out.latents.latents)), forcing.keyframes(MEASURED_FRAMES)
    said = reader.heads.covers(forcing.places(reader.vin, held_out.latents.embeds, keyframes)).sigmoid()
    covered = held_out.covers(pick, [time - 1 for time in keyframes])
    return {"explained": 1 - ((said - covered).square().mean() / covered.var(correction=0)).item()}


def _read(
    reader: Reader,
    forcing: TogetherForcing,
    scenes: Latents,
    pick: Tensor,
    frames: int,
    times_B: Tensor,
    is_open_B: Tensor,
    draws: Draws,
) -> tuple[Tensor, Tensor]:
    """The global tokens of noised scenes, and their whole texts."""
    clean, _ = scenes.frames(pick, 0, frames)
    whole = scenes.embeds[pick.to(clean.device)]
    embeds = torch.where(is_open_B.view(-1, 1, 1), leave_open(whole, colors=True), whole)
    return forcing.read(reader.vin, clean, draws.normal(tuple(clean.shape)), embeds, times_B), whole


def _told(whole_BLW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The numbers of the background's colour, (B,), and the objects', (B, 2), and which objects there are, (B, 2)."""
    objects = whole_BLW[:, 1:, COLOR_INDICES]
    return whole_BLW[:, 0, BACKGROUND_INDICES].argmax(-1), objects.argmax(-1), objects.sum(-1) > 0


def _shares(spec: SceneSpec, starts: Sequence[float], rows: int) -> Tensor:
    """What each object of a scene covers and shows of each token, (F, O, S)."""
    size = PIXELS * rows
    shown = torch.zeros(OBJECTS, PIXEL_FRAMES, size, size)
    for number, cover_TXX in enumerate(covers(spec, starts, torch.arange(PIXEL_FRAMES), size)):
        shown[:number] *= 1 - cover_TXX  # it is in front of those before
        shown[number] = cover_TXX
    tokens = functional.avg_pool2d(shown, PIXELS).flatten(2)
    later = tokens[:, 1:].unflatten(1, (-1, 4)).mean(2)  # a latent frame after the first is four pixel frames
    return torch.cat([tokens[:, :1], later], 1).transpose(0, 1).half()
