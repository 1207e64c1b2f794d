"""The training set: scenes rendered and encoded once, each process its own share.

Shapes: N videos, F latent frames, C channels, O = 2 objects, X latent width = height, L text tokens, E text width.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from causalrope_sp.codec.wan_vae import WanEncoderStream
from causalrope_sp.codec.wan_vae_model import WanVae
from causalrope_sp.toybox.prompts import BACKGROUNDS, COLORS, MOTIONS, SHAPES, SIZES, SceneSpec
from causalrope_sp.toybox.scenes import START_VARIABLES, random_scene, render, tracks
from causalrope_sp.toybox.toybox_text import encode_scene

from .coverage import coverage_of
from .kept import BATCH, fingerprint, kept, progress
from .training import processes, rank

HARD = {  # how much more often than 1 a scene is drawn for the words of each of its objects
    "bounces": 4.0,
    "orbits clockwise": 2.0,
    "orbits counterclockwise": 2.0,
    "pulses": 2.0,
    "square": 1.5,
    "triangle": 1.2,
    "small": 1.4,
}
MEETING = 1.5  # and for objects that meet
PIXEL_FRAMES = 81  # of an encoded scene
SIZE = 64  # height and width of every picture in pixels
LATENT_FRAMES = 1 + (PIXEL_FRAMES - 1) // 4  # whose last 16 are a whole period
PERIOD = 16  # latent frames after which every motion repeats itself
SCENE_SEED, HELD_OUT_SEED = 72_000_000, 99_000_000
LAYOUT = 2  # of files of encoded scenes; the one before had no coverage
HELD_OUT = 64  # scenes that are never learned from
VISIBLE = 0.3  # how far a latent must be from the background's to count as part of an object, in its own units


@dataclass(frozen=True)
class Latents:
    """Encoded scenes: latents (N, F, C, X, X) in float16, text embeddings (N, L, E), where objects are (N, F, X, X),
    how much of each latent pixel each covers, (N, F, O, X, X) in float16, the scenes themselves with their starts,
    (N, 6), and how often each is drawn, relative to others, (N,). Only `train_vin` learns from coverage; it is made
    here because both recipes share the file. What tells of scenes stays on the CPU."""

    latents: Tensor
    embeds: Tensor
    objects: Tensor
    coverage: Tensor
    scenes: list[SceneSpec]
    starts_N6: Tensor
    weights_N: Tensor

    def to(self, device: torch.device) -> Latents:
        """Returns the same scenes with what is learned from on a device."""
        learned = {name: getattr(self, name).to(device) for name in ("latents", "embeds", "objects", "coverage")}
        return replace(self, **learned)

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Draws the numbers of scenes, on the CPU."""
        return torch.multinomial(self.weights_N, count, replacement=True, generator=generator)

    def frames(self, picked: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Latents in float32, and where objects are, of the frames from `start` to before `stop` of the picked scenes.
        Frames after the encoded ones are those of the same moment some periods earlier."""
        chosen = self._chosen(picked, range(start, stop))
        return self.latents[chosen].float(), self.objects[chosen]

    def covered(self, picked: Tensor, frames: Sequence[int]) -> Tensor:
        """How much objects cover of latent pixels in some frames of the picked scenes, float32, (B, F, O, X, X)."""
        return self.coverage[self._chosen(picked, frames)].float()

    def _chosen(self, picked: Tensor, frames: Sequence[int]) -> tuple[Tensor, Tensor]:
        device = self.latents.device
        return picked.to(device).unsqueeze(1), encoded_frames(frames, device)


def mean_on_objects(error: Tensor, objects: Tensor) -> Tensor:
    """The mean of the last axis of an error where there is an object; 0 where there is none."""
    return (error * objects).sum(-1) / objects.sum(-1).clamp(min=1)


def encoded_frames(frames: Sequence[int], device: torch.device) -> Tensor:
    """The numbers of the encoded frames that show the same as those of a longer video, (F,)."""
    repeated = LATENT_FRAMES - PERIOD  # the first frame of the period that goes on
    return torch.tensor([f if f < repeated else repeated + (f - repeated) % PERIOD for f in frames], device=device)


@dataclass(frozen=True)
class Changes:
    """Scenes before and after a change of their text, at the same starts: latents `before` (N, 13, C, X, X) and `after`
    (N, 16, C, X, X) in float16, and of `after` the text embeddings (N, L, E) and where objects are (N, 16, X, X)."""

    before: Tensor
    after: Tensor
    embeds: Tensor
    objects: Tensor

    def to(self, device: torch.device) -> Changes:
        """Returns the same scenes on a device."""
        return Changes(*(x.to(device) for x in (self.before, self.after, self.embeds, self.objects)))


def other_scene(scene: SceneSpec, rng: random.Random) -> SceneSpec:
    """A scene of as many objects, most of them of another colour, some of another shape, motion or size."""
    free = [color for color in COLORS if color not in [o.color for o in scene.objects]]
    rng.shuffle(free)
    objects = []
    for o, color in zip(scene.objects, free, strict=False):
        changes = {"color": color} if rng.random() < 0.85 else {}
        for name, options, chance in (("shape", SHAPES, 0.35), ("motion", MOTIONS, 0.25), ("size", SIZES, 0.2)):
            if rng.random() < chance:
                changes[name] = rng.choice([option for option in options if option != getattr(o, name)])
        objects.append(replace(o, **changes))
    backgrounds = [word for word in BACKGROUNDS if word != scene.background]
    return SceneSpec(tuple(objects), rng.choice(backgrounds) if rng.random() < 0.25 else scene.background)


@torch.inference_mode()
def encode_changes(codec: WanVae, path: Path, videos: int, seed: int) -> Changes:
    """Renders and encodes this process's share of scenes before and after a change of their text, or reads them from
    `path`; see `kept`."""
    rng, batches = random.Random(seed + rank()), range(rank(), videos // BATCH, processes())

    def make() -> dict[str, Tensor]:
        empty, parts = _backgrounds(codec, 61), list[tuple[Tensor, ...]]()
        for batch in batches:
            scenes, starts = draw_scenes(seed + batch)
            before = _encode(codec, [other_scene(scene, rng) for scene in scenes], starts, 49)
            after = _encode(codec, scenes, starts, 61)
            behind = torch.stack([empty[scene.background] for scene in scenes])
            embeds = torch.stack([encode_scene(scene, start) for scene, start in zip(scenes, starts, strict=True)])
            parts.append((before.half(), after.half(), embeds, (after - behind).abs().mean(2) > VISIBLE))
            progress("encoding changes", BATCH * len(parts), BATCH * len(batches))
        return dict(
            zip(("before", "after", "embeds", "objects"), map(torch.cat, zip(*parts, strict=True)), strict=True)
        )

    return Changes(**kept(path, [videos, SIZE, seed, fingerprint(*codec.encoder.parameters())], make))


def draw_scenes(seed: int) -> tuple[list[SceneSpec], Tensor]:
    """The scenes of one batch, and the starts of their objects, (BATCH, 6)."""
    generator = torch.Generator().manual_seed(seed)
    scenes = [random_scene(generator) for _ in range(BATCH)]
    return scenes, torch.rand(BATCH, START_VARIABLES, generator=generator)


def held_out_scenes(codec: WanVae, path: Path) -> Latents:
    """Scenes that are never learned from, the same on every process."""
    return encode_scenes(codec, path, HELD_OUT, HELD_OUT_SEED, only_own=False)


def _drawn_scenes(videos: int, seed: int, only_own: bool = True) -> list[tuple[list[SceneSpec], Tensor]]:
    """Draws the batches of a training set, with `only_own` this process's alone; see `draw_scenes`."""
    batches = range(rank(), videos // BATCH, processes()) if only_own else range(videos // BATCH)
    return [draw_scenes(seed + batch) for batch in batches]


@torch.inference_mode()
def encode_scenes(codec: WanVae, path: Path, videos: int, seed: int, only_own: bool = True) -> Latents:
    """Renders and encodes `videos` scenes of `PIXEL_FRAMES` frames, with `only_own` this process's part of them, or
    reads them from `path`; see `kept`."""
    drawn = _drawn_scenes(videos, seed, only_own)

    def make() -> dict[str, Tensor]:
        empty, parts = _backgrounds(codec, PIXEL_FRAMES), list[tuple[Tensor, ...]]()
        for specs, starts in drawn:
            latents = _encode(codec, specs, starts, PIXEL_FRAMES)
            behind = torch.stack([empty[scene.background] for scene in specs])
            embeds = torch.stack([encode_scene(scene, start) for scene, start in zip(specs, starts, strict=True)])
            objects = (latents - behind).abs().mean(2) > VISIBLE
            described = zip(specs, starts.tolist(), strict=True)
            covered = [coverage_of(spec, start, PIXEL_FRAMES, latents.shape[-1]) for spec, start in described]
            parts.append((latents.half(), embeds, objects, torch.stack(covered)))
            progress(f"encoding {path.name}", BATCH * len(parts), BATCH * len(drawn))
        names = ("latents", "embeds", "objects", "coverage")
        return dict(zip(names, map(torch.cat, zip(*parts, strict=True)), strict=True))

    found = kept(path, [videos, PIXEL_FRAMES, SIZE, seed, fingerprint(*codec.encoder.parameters()), LAYOUT], make)
    scenes, starts = [scene for specs, _ in drawn for scene in specs], torch.cat([starts for _, starts in drawn])
    weights = torch.tensor([_weight(*scene) for scene in zip(scenes, starts, strict=True)])
    return Latents(**found, scenes=scenes, starts_N6=starts, weights_N=weights)


def _encode(codec: WanVae, scenes: list[SceneSpec], starts: Tensor, frames: int) -> Tensor:
    """The latents of scenes that are rendered where the codec is, on the CPU, (N, F, C, X, X)."""
    with next(codec.parameters()).device:
        pixels = render(scenes, starts, torch.arange(frames), SIZE).transpose(1, 2) * 2 - 1
    return WanEncoderStream(codec).encode(pixels).cpu()


def _backgrounds(codec: WanVae, frames: int) -> dict[str, Tensor]:
    """The latents of scenes without objects, (F, C, X, X), by the background's word."""
    nowhere = torch.zeros(1, START_VARIABLES)
    return {word: _encode(codec, [SceneSpec((), word)], nowhere, frames)[0] for word in BACKGROUNDS}


def _weight(scene: SceneSpec, starts_6: Tensor) -> float:
    """How often a scene is drawn, relative to others."""
    words = [(o.motion, o.shape, o.size) for o in scene.objects]
    weight = sum(math.prod(HARD.get(word, 1.0) for word in of_object) for of_object in words)
    paths = tracks(scene, starts_6.tolist(), torch.arange(64.0))
    if len(paths) == 2:
        apart = (paths[0].center_T2 - paths[1].center_T2).norm(dim=1) - paths[0].radius_T - paths[1].radius_T
        weight *= MEETING if apart.min() < 0 else 1
    return weight
