"""A contact sheet of what a video can start from, made by toybox: python examples/conditioning.py [OUT.png]

One row each, the conditioning and then every fourth pixel frame: an image (a rendered scene, drawn for the seed that
follows and for another), the end of a video that is continued, and a video redrawn in another colour at growing
strength.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from PIL import Image, ImageDraw

from causalrope_sp import CausalVideoPipeline
from causalrope_sp.diffusion.noise import keyed_generator
from causalrope_sp.io.media_reader import fit
from causalrope_sp.toybox.prompts import parse_prompt
from causalrope_sp.toybox.scenes import START_VARIABLES, render

PROMPT, RECOLORED = "a large red circle slides right", "a large blue circle slides right"
SEED, SHOWN, SCALE, LABEL, AXIS = 3, 10, 2, 310, 34


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("out", type=click.Path(dir_okay=False, writable=True, path_type=Path), default="conditioning.png")
def main(out: Path) -> None:
    """Draws what a video can start from to OUT, a picture; the default is conditioning.png."""
    if not out.parent.is_dir() or out.suffix not in Image.registered_extensions():
        raise click.BadParameter(f"expected a picture such as {out.stem}.png in a folder that exists, not {out}")
    pipe = CausalVideoPipeline.from_pretrained("toybox")
    picture = scene(256)
    first = fit(picture, pipe.height, pipe.width)[None]
    video = made(pipe, PROMPT, 49, SEED)
    rows = [
        ("text alone", None, video),
        ("image, the same seed", first, made(pipe, PROMPT, 49, SEED, image=picture)),
        ("image, another seed", first, made(pipe, PROMPT, 49, SEED + 1, image=picture)),
        ("continued, the same seed", video[-1:], made(pipe, PROMPT, 48, SEED, video=video)),
        ("continued, another seed", video[-1:], made(pipe, PROMPT, 48, SEED + 1, video=video)),
        *(
            (
                f"redrawn in blue, strength {strength}",
                video[:1],
                made(pipe, RECOLORED, 49, SEED, video=video, strength=strength),
            )
            for strength in (0.25, 0.5, 0.75, 1)
        ),
    ]
    sheet(rows).save(out)
    print(f"{out}: {len(rows)} rows")


def made(pipe: CausalVideoPipeline, prompt: str, frames: int, seed: int, **start: Any) -> np.ndarray:
    return np.concatenate([chunk.frames for chunk in pipe.stream(prompt, num_frames=frames, seed=seed, **start)])


def scene(size: int) -> np.ndarray:
    """The first frame of the truth that the prompt and the seed describe."""
    starts = torch.rand(1, START_VARIABLES, generator=keyed_generator(SEED))
    pixels = render([parse_prompt(PROMPT)], starts, torch.zeros(1), size)
    return (255 * pixels[0, :, 0]).round().to(torch.uint8).movedim(0, 2).numpy()


def sheet(rows: Sequence[tuple[str, np.ndarray | None, np.ndarray]]) -> Image.Image:
    """The conditioning in a frame, then every fourth pixel frame, above an axis of frame numbers."""
    tile = 64 * SCALE
    page = Image.new("RGB", (LABEL + (SHOWN + 1) * (tile + 4) + 16, len(rows) * (tile + 4) + AXIS), "white")
    draw = ImageDraw.Draw(page)
    for row, (name, start, frames) in enumerate(rows):
        top = row * (tile + 4) + 2
        draw.text((10, top + tile // 2 - 10), name, fill="black", font_size=20)
        if start is not None:
            picture = tile_of(start[0])
            page.paste(picture, (LABEL, top))
            draw.rectangle((LABEL, top, LABEL + picture.width - 1, top + picture.height - 1), None, (220, 40, 40), 4)
        for column, frame in enumerate(frames[::4][:SHOWN], 1):
            page.paste(tile_of(frame), (LABEL + column * (tile + 4) + 16, top))
    top = len(rows) * (tile + 4) + 4
    draw.text((10, top), "pixel frame", fill="black", font_size=20)
    draw.text((LABEL + tile // 2, top), "conditioning", fill="black", font_size=20, anchor="ma")
    for column in range(SHOWN):
        left = LABEL + (column + 1) * (tile + 4) + 16
        draw.text((left + tile // 2, top), str(4 * column), fill="black", font_size=20, anchor="ma")
    return page


def tile_of(frame: np.ndarray) -> Image.Image:
    picture = Image.fromarray(frame)
    return picture.resize((picture.width * SCALE, picture.height * SCALE), Image.Resampling.NEAREST)


if __name__ == "__main__":
    main()
