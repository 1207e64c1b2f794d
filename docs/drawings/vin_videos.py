"""Draws docs/vin.png, frames of 256-frame videos by toybox-vin: python docs/drawings/vin_videos.py

The prompts are the first two of `benchmarks/vin.py`, with seeds 0 and 1. Neither was selected by its result.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

DOCS = Path(__file__).parent.parent
sys.path.insert(0, str(DOCS.parent / "benchmarks"))

from toybox_quality import draw_scenes  # noqa: E402
from vin_variants import Variants  # noqa: E402

WITH, WITHOUT, STREAM = "VIN", "VIN without global tokens", "autoregressive"
NAMES = {
    WITH: "with global tokens",
    WITHOUT: "without global tokens",
    STREAM: "toybox-flow, one chunk\nafter the other",
}
GROUPS = (  # title, scene and seed, what the text leaves open, the rows
    ("Prompt 1; the text does not say which colours there are.", 0, "colours", (WITH, WITHOUT)),
    ("Prompt 2; the text does not say which colours there are.", 1, "colours", (WITH, WITHOUT)),
    ("Prompt 2; the text says colours and starts.", 1, "nothing", (WITH, STREAM)),
)
NUM_FRAMES, SHOWN, TILE, GAP, LEFT, TITLE, AXIS = 256, 9, 88, 4, 190, 28, 44


def main() -> None:
    variants = Variants()
    scenes = draw_scenes(2)
    shown = np.linspace(0, NUM_FRAMES - 1, SHOWN).round().astype(int)
    height = sum(TITLE + len(rows) * (TILE + GAP) for *_, rows in GROUPS) + AXIS
    page = Image.new("RGB", (LEFT + SHOWN * (TILE + GAP), height), "white")
    pen, top = ImageDraw.Draw(page), 0
    for title, seed, left_open, rows in GROUPS:
        pen.text((4, top + 7), title, fill="black", font_size=15)
        top += TITLE
        for variant in rows:
            video = variants.video(variant, scenes[seed], NUM_FRAMES, seed, left_open)
            pen.text((4, top + TILE // 2), NAMES[variant], fill="black", font_size=14, anchor="lm")
            for column, frame in enumerate(video[shown]):
                tile = Image.fromarray(frame).resize((TILE, TILE), Image.Resampling.BICUBIC)
                page.paste(tile, (LEFT + column * (TILE + GAP), top))
            top += TILE + GAP
        print(title, scenes[seed].prompt())
    for column, index in enumerate(shown):
        pen.text((LEFT + column * (TILE + GAP) + TILE // 2, top + 4), str(index), "black", font_size=14, anchor="ma")
    pen.text((4, top + 4), "pixel frame (16 a second)", fill="black", font_size=14)
    page.save(DOCS / "vin.png", optimize=True)


if __name__ == "__main__":
    main()
