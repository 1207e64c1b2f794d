"""Measures at which noise level the colour of an object that the text leaves open can be told, and toybox-vin tells it.

    python benchmarks/vin_ladder.py

Held-out scenes of one object are encoded in each of the six colours, and the one in its own colour is noised. Ideal
observers, who know the clean latents of all six, name the colour of the largest likelihood: one sees the whole video,
one what toybox-vin computes the last chunk from (the keyframes, by the global tokens, and the chunk itself), one that
chunk alone. The clean latents that toybox-vin predicts for the chunk are nearest to one of the six: that is its choice,
with global tokens and without. Its text names neither colour nor background, which the observers know. Chance is 17 %.
What global tokens can add at a level is at most the difference between the second and the third observer. Shares are
given with their standard error over scenes. Takes about ten minutes on one core. JSON last.
"""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import count as numbers

import click
import numpy as np
import torch
from printed import stop
from toybox_quality import draw_scenes
from vin_variants import Variants, latent_frames, velocity

from causalrope_sp.diffusion.noise import keyed_generator
from causalrope_sp.toybox.prompts import COLORS, SceneSpec
from causalrope_sp.toybox.toybox_text import leave_open
from causalrope_sp.vin.chunks import AssignedChunks, cut

LEVELS = (0.99, 0.98, 0.97, 0.95, 0.9, 0.8)
OBSERVERS = ("whole video", "keyframes and last chunk", "last chunk", "toybox-vin", "toybox-vin without global tokens")


def lone_scenes(count: int) -> list[SceneSpec]:
    """The first held-out scenes of one object."""
    for drawn in numbers(2 * count, count):
        lone = [scene for scene in draw_scenes(drawn) if len(scene.objects) == 1]
        if len(lone) >= count:
            return lone[:count]
    raise AssertionError("half of all scenes have one object")


def recolored(scene: SceneSpec, color: str) -> SceneSpec:
    return replace(scene, objects=(replace(scene.objects[0], color=color),))


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--scenes", "count", default=32, show_default=True, type=click.IntRange(1), help="The number of scenes.")
@click.option("--draws", default=4, show_default=True, type=click.IntRange(1), help="The number of noises of a scene.")
@click.option("--frames", default=256, show_default=True, help="The length of a scene in pixel frames.")
@torch.inference_mode()
def main(count: int, draws: int, frames: int) -> None:
    """Tells by which noise level the colour of an object is decided, for ideal observers and for toybox-vin."""
    variants, length = Variants(), latent_frames(frames)
    config = variants.parallel_chunks.chunks
    chunks = cut(length, config)
    if len(chunks) < 2:
        stop(
            f"--frames: expected more than one chunk of {config.chunk_frames} latent frames, not {frames} pixel frames"
        )
    own = range(chunks[-1].start, chunks[-1].stop)
    video = AssignedChunks(cut(length, config, 1), config)
    seen = sorted({*video.offsets(video.keyframes), *own})
    right: dict[float, list[list[list[bool]]]] = {level: [[] for _ in range(count)] for level in LEVELS}
    for seed, scene in enumerate(lone_scenes(count)):
        clean_K = torch.cat([variants.latents(recolored(scene, color), frames, seed) for color in COLORS])
        true = list(COLORS).index(scene.objects[0].color)
        embeds = leave_open(variants.vin.text.encode(scene.prompt(), seed), colors=True)
        for draw in range(draws):
            noise = torch.randn(clean_K[:1].shape, generator=keyed_generator(seed, draw))
            for level in LEVELS:
                x = (1 - level) * clean_K[true : true + 1] + level * noise
                error_KF = (x - (1 - level) * clean_K).double().square().flatten(2).sum(2)
                errors = [error_KF, error_KF[:, seen], error_KF[:, own]]
                for global_tokens in (True, False):
                    made = x - level * velocity(variants, x, embeds, level, global_tokens)
                    errors.append((made - clean_K).square().flatten(2).sum(2)[:, own[config.overlap :]])
                right[level][seed].append([int(error.sum(1).argmin()) == true for error in errors])
    rows = {level: np.mean(found, axis=1) for level, found in right.items()}
    click.echo("| noise level | " + " | ".join(OBSERVERS) + " |\n|---" + "|---" * len(OBSERVERS) + "|")
    for level, shares in rows.items():
        cells = [f"{m:.0%} ± {s:.0%}" for m, s in zip(shares.mean(0), shares.std(0) / count**0.5, strict=True)]
        click.echo(f"| {level} | " + " | ".join(cells) + " |")
    means = {level: dict(zip(OBSERVERS, shares.mean(0).tolist(), strict=True)) for level, shares in rows.items()}
    click.echo(
        json.dumps({"benchmark": "vin_ladder", "scenes": count, "draws": draws, "frames": frames, "right": means})
    )


if __name__ == "__main__":
    main()
