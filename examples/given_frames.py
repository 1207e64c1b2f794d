"""A contact sheet of what a video can start from, made by toybox: python examples/given_frames.py [OUT.png]

One row each, every fourth frame behind what was given: a picture (a rendered scene, drawn for the seed that follows and
for another), the end of a video that is continued, and a video redrawn in another colour at growing strength.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw

from causalrope_sp import CausalVideoPipeline
from causalrope_sp.diffusion.noise import keyed_generator
from causalrope_sp.io.media_reader import fit
from causalrope_sp.toybox.prompts import parse_prompt
from causalrope_sp.toybox.scenes import PLACE_VARIABLES, render

PROMPT, RECOLOURED = "a large red circle slides right", "a large blue circle slides right"
SEED, SHOWN, SCALE, LABEL = 3, 12, 2, 230


def main(out: str = "docs/given_frames.png") -> None:
    pipe = CausalVideoPipeline.from_pretrained("toybox")
    picture = scene(256)
    first = fit(picture, pipe.height, pipe.width)[None]
    video = made(pipe, PROMPT, 49, SEED)
    rows = [
        ("generated", video[:1], video[1:]),
        ("picture", first, made(pipe, PROMPT, 49, SEED, image=picture)),
        ("picture, other seed", first, made(pipe, PROMPT, 49, SEED + 1, image=picture)),
        ("continued", video[-1:], made(pipe, PROMPT, 48, SEED, video=video)),
        ("continued, other seed", video[-1:], made(pipe, PROMPT, 48, SEED + 1, video=video)),
        *(
            (f"redrawn blue, {strength}", video[:1], made(pipe, RECOLOURED, 49, SEED, video=video, strength=strength))
            for strength in (0.25, 0.5, 0.75, 1)
        ),
    ]
    sheet(rows).save(out)
    print(f"{out}: {len(rows)} rows")


def made(pipe: CausalVideoPipeline, prompt: str, frames: int, seed: int, **given: object) -> np.ndarray:
    chunks = pipe.stream(prompt, num_frames=frames, seed=seed, **given)
    return np.concatenate([chunk.frames for chunk in chunks if chunk.frames is not None])


def scene(size: int) -> np.ndarray:
    """The first frame of the truth that the prompt and the seed describe."""
    places = torch.rand(1, PLACE_VARIABLES, generator=keyed_generator(SEED))
    pixels = render([parse_prompt(PROMPT)], places, torch.zeros(1), size)
    return (255 * pixels[0, :, 0]).round().to(torch.uint8).movedim(0, 2).numpy()


def sheet(rows: Sequence[tuple[str, np.ndarray, np.ndarray]]) -> Image.Image:
    """What was given, framed in white, then every fourth frame."""
    tile = 64 * SCALE
    page = Image.new("RGB", (LABEL + (SHOWN + 1) * (tile + 4) + 16, len(rows) * (tile + 4)), (60, 60, 66))
    draw = ImageDraw.Draw(page)
    for row, (name, given, frames) in enumerate(rows):
        top = row * (tile + 4) + 2
        draw.text((10, top + tile // 2 - 10), name, fill="white", font_size=20)
        for column, frame in enumerate([given[0], *frames[::4][:SHOWN]]):
            left = LABEL + column * (tile + 4) + (16 if column else 0)
            picture = Image.fromarray(frame)
            page.paste(picture.resize((picture.width * SCALE, picture.height * SCALE), 0), (left, top))
            if column == 0:
                draw.rectangle(
                    (left, top, left + picture.width * SCALE - 1, top + picture.height * SCALE - 1), None, "white", 2
                )
    return page


if __name__ == "__main__":
    main(*sys.argv[1:])
