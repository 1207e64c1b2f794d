"""At which noise level the colour of an object that the text leaves open can be told, and toybox-vin tells it.

    python benchmarks/vin_ladder.py

Held-out scenes of one object are encoded in each of the six colours, and the one in its own colour is noised. Two ideal
observers, who know the clean latents of all six, name the colour of the largest likelihood: one sees the last chunk
alone, one the whole video. What toybox-vin makes of the last chunk is nearest to one of the six; so its own choice is
read, with global tokens and without. Chance is 17 %. Chunks can agree on a colour by global tokens only between the
levels at which the whole video tells it and a chunk alone does not. JSON last.
"""

from __future__ import annotations

import json
from dataclasses import replace

import click
import numpy as np
import torch
from toybox_quality import draw_scenes
from vin_variants import Variants, latent_frames, velocity

from causalrope_sp.diffusion.noise import keyed_generator
from causalrope_sp.toybox.prompts import COLORS, SceneSpec
from causalrope_sp.toybox.toybox_text import leave_open
from causalrope_sp.vin.chunks import cut

LEVELS = (0.995, 0.99, 0.98, 0.97, 0.95, 0.9, 0.8)
OBSERVERS = ("ideal, whole video", "ideal, last chunk", "toybox-vin", "toybox-vin without global tokens")


def recolored(scene: SceneSpec, color: str) -> SceneSpec:
    return replace(scene, objects=(replace(scene.objects[0], color=color),))


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--scenes", "count", default=32, show_default=True, type=click.IntRange(1))
@click.option("--frames", default=256, show_default=True, type=click.IntRange(33), help="pixel frames of a scene")
@torch.inference_mode()
def main(count: int, frames: int) -> None:
    """Tells by which noise level the colour of an object is decided, for ideal observers and for toybox-vin."""
    variants = Variants()
    last = cut(latent_frames(frames), variants.parallel_chunks.chunks)[-1]
    own = slice(last.start, last.stop)
    lone = [scene for scene in draw_scenes(3 * count) if len(scene.objects) == 1][:count]
    right: dict[float, list[list[bool]]] = {level: [] for level in LEVELS}
    for seed, scene in enumerate(lone):
        clean_K = torch.cat([variants.latents(recolored(scene, color), frames, seed) for color in COLORS])
        true = list(COLORS).index(scene.objects[0].color)
        embeds = leave_open(variants.vin.text.encode(scene.prompt(), seed), colors=True)
        noise = torch.randn(clean_K[:1].shape, generator=keyed_generator(seed, 1))
        for level in LEVELS:
            x = (1 - level) * clean_K[true : true + 1] + level * noise
            error = (x - (1 - level) * clean_K).double().square()
            named = [error.flatten(1).sum(1).argmin(), error[:, own].flatten(1).sum(1).argmin()]
            for global_tokens in (True, False):
                made = x - level * velocity(variants, x, embeds, level, global_tokens)
                named.append((made - clean_K)[:, own].square().flatten(1).sum(1).argmin())
            right[level].append([int(n) == true for n in named])
    rows = {level: np.mean(found, axis=0).tolist() for level, found in right.items()}
    click.echo("| noise level | " + " | ".join(OBSERVERS) + " |\n|---" + "|---" * len(OBSERVERS) + "|")
    for level, shares in rows.items():
        click.echo(f"| {level} | " + " | ".join(f"{share:.0%}" for share in shares) + " |")
    click.echo(json.dumps({"benchmark": "vin_ladder", "scenes": len(lone), "frames": frames, "right": rows}))


if __name__ == "__main__":
    main()
