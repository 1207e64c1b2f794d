"""Stage 2, the training set: scenes rendered and encoded once, each process its own share.

Shapes: N videos, F latent frames, C channels, X latent width = height, L text tokens, E text width.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from causalrope_sp.codec.wan_vae import WanEncoderStream
from causalrope_sp.codec.wan_vae_model import WanVae
from causalrope_sp.toybox.prompts import BACKGROUNDS, COLORS, MOTIONS, SHAPES, SIZES, SceneSpec
from causalrope_sp.toybox.scenes import PLACE_VARIABLES, random_scene, render, tracks
from causalrope_sp.toybox.toybox_text import encode_scene

from .training import processes, rank

BATCH = 16
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
PIXEL_FRAMES = 81  # of an encoded scene: 21 latent frames, whose last 16 are a whole period
PERIOD = 16  # latent frames after which every motion repeats itself
VISIBLE = 0.3  # how far a latent must be from the background's to count as part of an object, in its own units


@dataclass(frozen=True)
class Latents:
    """Encoded scenes: latents (N, F, C, X, X) in float16, text embeddings (N, L, E), where objects are (N, F, X, X),
    and how often a scene is drawn, (N,)."""

    latents: Tensor
    embeds: Tensor
    objects: Tensor
    scenes: list[SceneSpec]
    share: Tensor

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        return torch.multinomial(self.share, count, replacement=True, generator=generator)

    def frames(self, picked: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Latents in float32, and where objects are, of frames `start` to `stop` of the picked scenes. Frames after the
        encoded ones are those of the same moment some periods earlier."""
        last = self.latents.shape[1] - PERIOD
        at = [f if f < last else last + (f - last) % PERIOD for f in range(start, stop)]
        return self.latents[picked][:, at].float(), self.objects[picked][:, at]


@dataclass(frozen=True)
class Changes:
    """Scenes before and after a change of their text, at the same places: latents `before` (N, 13, C, X, X) and `after`
    (N, 16, C, X, X) in float16, and of `after` the text embeddings (N, L, E) and where objects are (N, 16, X, X)."""

    before: Tensor
    after: Tensor
    embeds: Tensor
    objects: Tensor


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
def encode_changes(codec: WanVae, path: Path, videos: int, size: int, seed: int) -> Changes:
    """Renders and encodes scenes before and after a change of their text, or reads them from `path`."""
    path = path.with_suffix(f".{rank()}.pt")
    if path.exists():
        return Changes(**torch.load(path, weights_only=True))
    device = next(codec.parameters()).device
    rng, parts = random.Random(seed + rank()), list[tuple[Tensor, ...]]()

    def encode(scenes: list[SceneSpec], places: Tensor, frames: int) -> Tensor:
        pixels = render(scenes, places, torch.arange(frames), size).transpose(1, 2).to(device) * 2 - 1
        return WanEncoderStream(codec).encode(pixels).cpu()

    empty = {word: encode([SceneSpec((), word)], torch.zeros(1, PLACE_VARIABLES), 61)[0] for word in BACKGROUNDS}
    for batch in range(rank(), videos // BATCH, processes()):
        scenes, places = draw_scenes(seed + batch)
        before = encode([other_scene(scene, rng) for scene in scenes], places, 49)
        after = encode(scenes, places, 61)
        behind = torch.stack([empty[scene.background] for scene in scenes])
        embeds = torch.stack([encode_scene(scene, p) for scene, p in zip(scenes, places, strict=True)])
        parts.append((before.half(), after.half(), embeds, (after - behind).abs().mean(2) > VISIBLE))
    found = [torch.cat(each).clone() for each in zip(*parts, strict=True)]
    torch.save(dict(zip(("before", "after", "embeds", "objects"), found, strict=True)), path)
    return Changes(*found)


def draw_scenes(seed: int) -> tuple[list[SceneSpec], Tensor]:
    """The scenes of one batch, and the places of their objects, (BATCH, 6)."""
    generator = torch.Generator().manual_seed(seed)
    scenes = [random_scene(generator) for _ in range(BATCH)]
    return scenes, torch.rand(BATCH, PLACE_VARIABLES, generator=generator)


@torch.inference_mode()
def encode_scenes(codec: WanVae, path: Path, videos: int, size: int, seed: int) -> Latents:
    """Renders and encodes this process's share of `videos` scenes of `frames` pixel frames, or reads it from `path`
    if the same was encoded before."""
    path = path.with_suffix(f".{rank()}.pt")
    weights = sum(float(p.double().square().sum()) for p in codec.encoder.parameters())
    made_from = [videos, PIXEL_FRAMES, size, seed, processes(), weights]
    batches = range(rank(), videos // BATCH, processes())
    drawn = [draw_scenes(seed + batch) for batch in batches]
    scenes = [scene for scenes, _ in drawn for scene in scenes]
    share = torch.tensor([_share(*drawn_) for specs, places in drawn for drawn_ in zip(specs, places, strict=True)])
    if path.exists():
        saved = torch.load(path, weights_only=True)
        if saved.pop("made_from") == made_from:
            return Latents(**saved, scenes=scenes, share=share)
    device = next(codec.parameters()).device

    def encode(scenes: list[SceneSpec], places: Tensor) -> Tensor:
        pixels = render(scenes, places, torch.arange(PIXEL_FRAMES), size).transpose(1, 2).to(device) * 2 - 1
        return WanEncoderStream(codec).encode(pixels).cpu()

    empty = {word: encode([SceneSpec((), word)], torch.zeros(1, PLACE_VARIABLES))[0] for word in BACKGROUNDS}
    parts: list[tuple[Tensor, ...]] = []
    for batch, (specs, places) in zip(batches, drawn, strict=True):
        latents = encode(specs, places)
        behind = torch.stack([empty[scene.background] for scene in specs])
        embeds = torch.stack([encode_scene(scene, p) for scene, p in zip(specs, places, strict=True)])
        parts.append((latents.half(), embeds, (latents - behind).abs().mean(2) > VISIBLE))
        print(f"encoded {(batch + 1) * BATCH} of {videos} videos", end="\r", flush=True)
    found = dict(zip(("latents", "embeds", "objects"), map(torch.cat, zip(*parts, strict=True)), strict=True))
    partial = path.with_suffix(".partial")
    torch.save({"made_from": made_from, **found}, partial)
    partial.replace(path)
    return Latents(**found, scenes=scenes, share=share)


def _share(scene: SceneSpec, places_6: Tensor) -> float:
    """How often a scene is drawn."""
    words = [(o.motion, o.shape, o.size) for o in scene.objects]
    share = sum(math.prod(HARD.get(word, 1.0) for word in of_object) for of_object in words)
    paths = tracks(scene, places_6.tolist(), torch.arange(64.0))
    if len(paths) == 2:
        apart = (paths[0].center_T2 - paths[1].center_T2).norm(dim=1) - paths[0].radius_T - paths[1].radius_T
        share *= MEETING if apart.min() < 0 else 1
    return share
