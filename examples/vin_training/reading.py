"""Teaches a VIN to read before its DiT takes part. A pair that starts together does not learn it: at the noise levels
where a colour is decided, a few tokens in hundreds tell it, faintly.

    positions  The text says where objects are: a linear layer on the VIN's position embeddings learns how much of each
               latent pixel each object covers. No video takes part, and no noise, so that a step learns from many
               texts. Then what embeds positions and texts stays as it is.
    colors     Linear layers on the first three global tokens name the colours that the text leaves open. Only the noisy
               video tells them. This goes on while the pair is trained.

The linear layers, which are probes, do not ship.

Shapes: B videos, O = 2 objects, S tokens a frame, P latent pixels of a token, T any tokens, D VIN width, G global
tokens, L text tokens, W text width.
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
from toybox_training.coverage import OBJECTS
from toybox_training.latents import Latents
from toybox_training.training import Training

from causalrope_sp.grid import LatentGrid
from causalrope_sp.toybox.toybox_text import BACKGROUND_INDICES, COLOR_INDICES, leave_open
from causalrope_sp.vin import VideoInterfaceNetwork

from .forward import ParallelChunksForcing, in_bfloat16
from .loop import Loss, Measure, Report, learn

SEED = 71_000_000
OF_POSITIONS = ("vin.frequencies", "vin.embed_position", "vin.embed_text", "vin.position_blocks", "probes.coverage")
OF_COLORS = (
    *("vin.z_init", "vin.embed_token", "vin.embed_time", "vin.ask_block", "vin.norm_tokens", "vin.norm_z", "vin.read"),
    *("vin.norm_read", "vin.blocks", "vin.norm_out", "probes.colors", "probes.backgrounds"),
)
POSITIONS_SHARE = 0.4  # of the time
TEXTS, FRAMES = 4, 10  # a step of the first stage has so many texts for each video of later steps, at so many frames
OPEN_SHARE = 0.8  # of videos whose text does not name colours
HIGH_NOISE = 0.7  # half of the noise levels are above
MEASURED_AT, MEASURED_FRAMES = (0.8, 0.9, 0.95), 65  # noise levels; latent frames


@dataclass(frozen=True)
class Options:
    """What a training is given: its folder, the lengths of its videos in latent frames with their shares, the videos of
    a step, the highest learning rate, and the fingerprint of the encoder."""

    out: Path
    lengths: dict[int, float]
    videos: int
    rate: float
    codec: int

    def draw_length(self, draws: Draws) -> int:
        shares = torch.tensor(list(self.lengths.values()))
        return list(self.lengths)[int(torch.multinomial(shares, 1, generator=draws.choices))]


class Probes(nn.Module):
    """The linear layers that tell what a VIN has learned."""

    def __init__(self, dim: int, pixels: int) -> None:
        super().__init__()
        self.coverage = nn.Linear(dim, OBJECTS * pixels)
        self.colors = nn.Linear(dim, len(COLOR_INDICES))
        self.backgrounds = nn.Linear(dim, len(BACKGROUND_INDICES))

    def coverage_loss(self, embedded_BTD: Tensor, covered: Tensor) -> Tensor:
        """The mean cross-entropy of what objects cover, (B, T, P·O), told from embeddings of positions."""
        return functional.binary_cross_entropy_with_logits(self.coverage(embedded_BTD), covered)

    def coverage_r2(self, embedded_BTD: Tensor, covered: Tensor) -> float:
        """How much of the variance of what objects cover is explained: 1 for all of it, 0 for none."""
        error = self.coverage(embedded_BTD).sigmoid() - covered
        return 1 - (error.square().mean() / covered.var(correction=0)).item()

    def color_loss(self, z_BGD: Tensor, whole_BLW: Tensor) -> Tensor:
        """The mean cross-entropy of the objects' colours, plus that of backgrounds; the texts leave nothing open."""
        background, objects, there = _told(whole_BLW)
        errors = functional.cross_entropy(self.colors(z_BGD[:, :OBJECTS]).transpose(1, 2), objects, reduction="none")
        of_background = functional.cross_entropy(self.backgrounds(z_BGD[:, OBJECTS]), background)
        return (errors * there).sum() / there.sum() + of_background

    def color_accuracy(self, z_BGD: Tensor, whole_BLW: Tensor) -> float:
        """The share of objects whose colour is named."""
        _, objects, there = _told(whole_BLW)
        right = self.colors(z_BGD[:, :OBJECTS]).argmax(-1) == objects
        return ((right & there).sum() / there.sum()).item()


class Reader(nn.Module):
    """The part of a pair that learns alone."""

    def __init__(self, vin: VideoInterfaceNetwork, probes: Probes) -> None:
        super().__init__()
        self.vin, self.probes = vin, probes


def by_muon(name: str, parameter: nn.Parameter) -> bool:
    """Whether Muon takes a parameter: the matrices of blocks and of what a VIN hands over."""
    blocks = ("blocks.", "ask_block.", "hand_over.")
    return parameter.ndim == 2 and any(part in name for part in blocks) and "modulation" not in name


def learn_positions(
    reader: Reader,
    scenes: Latents,
    held_out: Latents,
    forcing: ParallelChunksForcing,
    options: Options,
    minutes: float,
) -> None:
    """Trains what embeds positions and texts for so many minutes. The reader keeps the averaged weights."""

    def loss(model: Reader, draws: Draws, _: float) -> tuple[Tensor, Report]:
        pick = scenes.draw(TEXTS * options.videos, draws.choices).to(forcing.device)
        frames = [draws.below(max(options.lengths)) for _ in range(FRAMES)]
        embeds = _opened(scenes.embeds[pick], draws.which(OPEN_SHARE, len(pick)))
        embedded = _embedded(forcing, model, embeds, [1 + frame for frame in frames])
        return model.probes.coverage_loss(embedded, _covered(forcing.grid, scenes, pick, frames)), {}

    measure = partial(_coverage_r2, forcing, held_out)
    _learn(reader, "positions", OF_POSITIONS, loss, measure, forcing, options, minutes)


def learn_colors(
    reader: Reader, scenes: Latents, held_out: Latents, forcing: ParallelChunksForcing, options: Options, minutes: float
) -> None:
    """Trains the rest of what reads for so many minutes, or loads it, with 0 minutes. The reader keeps the averaged
    weights."""

    def loss(model: Reader, draws: Draws, _: float) -> tuple[Tensor, Report]:
        frames, videos = options.draw_length(draws), options.videos
        levels = draws.uniform(videos)
        levels = torch.where(draws.which(0.5, videos), HIGH_NOISE + (1 - HIGH_NOISE) * draws.uniform(videos), levels)
        pick, is_open = scenes.draw(videos, draws.choices), draws.which(OPEN_SHARE, videos)
        z, whole = _read(model, forcing, scenes, pick, frames, levels, is_open, draws)
        return model.probes.color_loss(z, whole), {"accuracy": model.probes.color_accuracy(z, whole)}

    measure = partial(color_accuracy, forcing, held_out)
    _learn(reader, "colors", OF_COLORS, loss, measure, forcing, options, minutes)


def _learn(
    reader: Reader,
    name: str,
    learned: Sequence[str],
    loss: Loss[Reader],
    measure: Measure[Reader],
    forcing: ParallelChunksForcing,
    options: Options,
    minutes: float,
) -> None:
    for of, parameter in reader.named_parameters():
        parameter.requires_grad_(of.startswith(tuple(learned)))
    training = Training(reader, options.out / f"{name}.pt", options.rate, by_muon, average=0.997, codec=options.codec)
    averaged = learn(training, minutes, SEED, forcing.device, loss, measure)
    reader.load_state_dict(averaged.state_dict())


@torch.no_grad()
def color_accuracy(forcing: ParallelChunksForcing, held_out: Latents, reader: Reader) -> Report:
    """The shares of open colours that are named in scenes which are never learned from, by noise level."""
    pick, found = torch.arange(len(held_out.latents)), {}
    everything = torch.ones(len(pick), dtype=torch.bool, device=forcing.device)
    for level in MEASURED_AT:
        draws, levels = Draws.seeded(SEED, forcing.device), torch.full((len(pick),), level, device=forcing.device)
        z, whole = _read(reader, forcing, held_out, pick, MEASURED_FRAMES, levels, everything, draws)
        found[f"accuracy_{level}"] = reader.probes.color_accuracy(z, whole)
    return found


@torch.no_grad()
def _coverage_r2(forcing: ParallelChunksForcing, held_out: Latents, reader: Reader) -> Report:
    """How much of the variance of coverage is explained in scenes which are never learned from, colours open."""
    pick, keyframes = torch.arange(len(held_out.latents)), forcing.keyframes(MEASURED_FRAMES)
    embedded = _embedded(forcing, reader, leave_open(held_out.embeds, colors=True), keyframes)
    truth = _covered(forcing.grid, held_out, pick, [index - 1 for index in keyframes])
    return {"r2": reader.probes.coverage_r2(embedded, truth)}


def _embedded(forcing: ParallelChunksForcing, reader: Reader, embeds: Tensor, indices: Sequence[int]) -> Tensor:
    """A VIN's embeddings of the positions of tokens at these global time indices, float32, (B, len(indices)·S, D)."""
    with in_bfloat16(forcing.device):
        return forcing.position_embeddings(reader.vin, reader.vin.text(embeds), indices).float()


def _covered(grid: LatentGrid, scenes: Latents, picked: Tensor, frames: Sequence[int]) -> Tensor:
    """What objects cover in some latent frames of some scenes, (B, len(frames)·S, P·O)."""
    return grid.patchify(scenes.covered(picked, frames)).flatten(1, 2)


def _read(
    reader: Reader,
    forcing: ParallelChunksForcing,
    scenes: Latents,
    pick: Tensor,
    frames: int,
    levels_B: Tensor,
    is_open_B: Tensor,
    draws: Draws,
) -> tuple[Tensor, Tensor]:
    """The global tokens of noised scenes, (B, G, D), and their whole texts, (B, L, W)."""
    clean, _ = scenes.frames(pick, 0, frames)
    whole = scenes.embeds[pick.to(clean.device)]
    noise = draws.normal(tuple(clean.shape))
    return forcing.read(reader.vin, clean, noise, _opened(whole, is_open_B), levels_B), whole


def _opened(whole_BLW: Tensor, is_open_B: Tensor) -> Tensor:
    """The texts, some of which do not name colours."""
    return torch.where(is_open_B.view(-1, 1, 1), leave_open(whole_BLW, colors=True), whole_BLW)


def _told(whole_BLW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The numbers of the background's colour, (B,), and the objects', (B, 2), and which objects there are, (B, 2)."""
    objects = whole_BLW[:, 1:, COLOR_INDICES]
    return whole_BLW[:, 0, BACKGROUND_INDICES].argmax(-1), objects.argmax(-1), objects.sum(-1) > 0
