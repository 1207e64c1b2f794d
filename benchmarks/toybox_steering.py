"""Judges whether toybox follows what it is told while it runs.

    python benchmarks/toybox_steering.py [--count 16]

A new prompt: one object, whose colour changes after four chunks with the window computed anew; right if the judge sees
the new colour in the two chunks after the next two. A first image: one object that moves evenly, with a start that the
seed has not drawn; right if 16 frames on the object is within a tenth of the picture of where the image leads to.
Scenes and seeds are drawn in order and not chosen. The last line is JSON.
"""

from __future__ import annotations

import sys
from dataclasses import replace

import click
import numpy as np
import torch
from printed import finish, stop
from videos import video_of

from causalrope_sp import CausalRopeError, CausalVideoPipeline
from causalrope_sp.toybox.judge import judge
from causalrope_sp.toybox.prompts import COLORS, SceneSpec
from causalrope_sp.toybox.scenes import START_VARIABLES, random_scene, render, tracks
from causalrope_sp.toybox.seen import follow

CHANGES, IMAGES = 95_000_000, 94_000_000  # the seeds of the scenes
GOAL = 0.9  # the share of new prompts and of images that is to be followed


def follows_a_prompt(pipe: CausalVideoPipeline, scene: SceneSpec, seed: int) -> bool:
    (found,) = scene.objects
    others = [color for color in COLORS if color != found.color]
    changed = SceneSpec((replace(found, color=others[seed % len(others)]),), scene.background)
    with pipe.open(scene.prompt(), seed=seed) as session:
        for _ in range(4):
            session.step()
        session.set_prompt(changed.prompt())
        chunks = [session.step() for _ in range(4)][2:]
    frames = np.concatenate([chunk.frames for chunk in chunks if chunk.frames is not None])
    return all(verdict.color for verdict in judge(frames, changed))


def follows_an_image(pipe: CausalVideoPipeline, scene: SceneSpec, starts: torch.Tensor, seed: int) -> bool:
    pixels = render([scene], starts, torch.arange(1), pipe.height)[0]
    image = (255 * pixels[:, 0].permute(1, 2, 0)).round().to(torch.uint8).numpy()
    video = np.asarray(video_of(pipe, scene.prompt(), num_frames=21, seed=seed, image=image))
    seen, _ = follow(video, scene)
    wanted = tracks(scene, starts[0].tolist(), torch.arange(float(len(video))))[0].center_T2.numpy()
    apart = np.hypot(*np.abs((seen[0] - wanted + 0.5) % 1 - 0.5)[-5:].T)
    return bool(np.where(np.isnan(apart), 9, apart).max() < 0.1)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--model", default="toybox", show_default=True, help="The model: a name, a folder or a file.")
@click.option(
    "--count", default=16, show_default=True, type=click.IntRange(1), help="The number of new prompts, and of images."
)
@click.option("--check", is_flag=True, help=f"Exit with status 1 if less than {GOAL:.0%} of either is right.")
def main(model: str, count: int, check: bool) -> None:
    """Judges whether a toybox model follows a new prompt and a first image."""
    torch.set_num_threads(1)
    try:
        pipe = CausalVideoPipeline.from_pretrained(model)
    except CausalRopeError as error:
        stop(str(error))
    generator, prompts, seed = torch.Generator().manual_seed(CHANGES), list[bool](), 0
    while len(prompts) < count:
        scene, seed = random_scene(generator), seed + 1
        if len(scene.objects) == 1:
            prompts.append(follows_a_prompt(pipe, scene, seed))
    generator, images, seed = torch.Generator().manual_seed(IMAGES), list[bool](), 0
    while len(images) < count:
        scene, starts = random_scene(generator), torch.rand(1, START_VARIABLES, generator=generator)
        seed += 1
        if len(scene.objects) == 1 and scene.objects[0].motion not in ("bounces", "pulses"):
            images.append(follows_an_image(pipe, scene, starts, seed))
    print(f"a new colour: {sum(prompts)} of {count}; a first image: {sum(images)} of {count}")
    finish("toybox_steering", model=model, prompts=sum(prompts), images=sum(images), count=count)
    sys.exit(int(check and min(sum(prompts), sum(images)) < GOAL * count))


if __name__ == "__main__":
    main()
