"""Draws docs/sessions.png, the timeline of a session: python docs/drawings/sessions.py

One session of toybox with seed 0, which was not selected: two changes of prompt, a rewind and a fork. A picture stands
for a chunk and is its last frame.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from causalrope_sp import CausalVideoPipeline, VideoChunk

TILE, GAP, LABEL = 88, 6, 34
FIRST, SECOND, THIRD = "a red circle slides right", "a blue circle slides right", "a blue square bounces"


def main() -> None:
    pipe = CausalVideoPipeline.from_pretrained("toybox")
    session = pipe.open(FIRST, seed=0, history=3)
    rows: list[tuple[str, int, list[VideoChunk]]] = []
    main_row = [session.step() for _ in range(3)]
    session.set_prompt(SECOND)
    main_row += [session.step() for _ in range(4)]
    fork = session.fork()
    rows.append((f"session: {FIRST} | from chunk 3 {SECOND.removeprefix('a ')}", 0, main_row))
    fork.set_prompt(THIRD)
    rows.append((f"fork() after chunk 6, set_prompt({THIRD!r})", 7, [fork.step() for _ in range(3)]))
    session.rewind(2)
    session.set_prompt("a green circle slides right", recache=False)
    rows.append(("rewind(2), then a green circle, without a new cache", 5, [session.step() for _ in range(5)]))
    height = len(rows) * (TILE + LABEL + GAP) + GAP
    page = Image.new("RGB", (10 * (TILE + GAP) + GAP, height), "white")
    draw = ImageDraw.Draw(page)
    for number, (label, start, chunks) in enumerate(rows):
        top = GAP + number * (TILE + LABEL + GAP)
        draw.text((GAP + start * (TILE + GAP), top), label, fill="black")
        for at, chunk in enumerate(chunks, start):
            assert chunk.frames is not None
            left = GAP + at * (TILE + GAP)
            draw.text((left, top + 16), f"chunk {chunk.index}, prompt {chunk.prompt_id}", fill="gray")
            picture = Image.fromarray(np.asarray(chunk.frames[-1])).resize((TILE, TILE), Image.Resampling.NEAREST)
            page.paste(picture, (left, top + LABEL))
    out = Path(__file__).parent.parent / "sessions.png"
    page.save(out, optimize=True)
    print(f"{out}: {out.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
