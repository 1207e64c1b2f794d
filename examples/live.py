"""A session that is driven from the keyboard, into a file that can be played while it grows:

python examples/live.py [OUT.mp4]

Keys: r g b y p o (the colour), c s t (the shape), < > ^ v (slides), x bounces, u (take two chunks back), space (pause),
q (end). Where stdin is no terminal, its lines are prompts, one a chunk, and an empty line changes nothing.
"""

from __future__ import annotations

import select
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from causalrope_sp import CausalVideoPipeline
from causalrope_sp.io.video_writer import VideoWriter

COLORS = {"r": "red", "g": "green", "b": "blue", "y": "yellow", "p": "purple", "o": "orange"}
SHAPES = {"c": "circle", "s": "square", "t": "triangle"}
MOTIONS = {"<": "slides left", ">": "slides right", "^": "slides up", "v": "slides down", "x": "bounces"}


@contextmanager
def keys() -> Iterator[None]:
    """Lets single keys through, without Enter, while the body runs."""
    import termios
    import tty

    before = termios.tcgetattr(sys.stdin)
    try:
        tty.setcbreak(sys.stdin)
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


def pressed() -> str:
    """The key that was pressed since the last call; "" for none."""
    return sys.stdin.read(1) if select.select([sys.stdin], [], [], 0)[0] else ""


def by_keys(out: str) -> None:
    color, shape, motion, chunks = "red", "circle", "slides right", 0
    pipe = CausalVideoPipeline.from_pretrained("toybox")
    with (
        pipe.open(f"a {color} {shape} {motion}", history=4) as session,
        VideoWriter(out, pipe.height, pipe.width, pipe.fps) as video,
        keys(),
    ):
        while (key := pressed()) != "q":
            before = color, shape, motion
            color, shape, motion = COLORS.get(key, color), SHAPES.get(key, shape), MOTIONS.get(key, motion)
            if (color, shape, motion) != before:
                session.set_prompt(f"a {color} {shape} {motion}")
            if key == "u" and chunks >= 2:
                chunks, exact = chunks - 2, session.rewind(2)
                print(f"\ntaken back, {'as it was' if exact else 'window computed anew'}")
            while key == " " and pressed() != " ":
                time.sleep(0.05)
            chunk, chunks = session.step(), chunks + 1
            video.write(chunk.frames)
            print(f"\r{video.frames} frames, {session.prompts[-1].prompt}   ", end="", flush=True)
    print(f"\n{video.frames} frames in {out}")


def by_lines(out: str) -> None:
    pipe = CausalVideoPipeline.from_pretrained("toybox")
    with (
        pipe.open("a red circle slides right") as session,
        VideoWriter(out, pipe.height, pipe.width, pipe.fps) as video,
    ):
        for line in sys.stdin:
            if line.strip():
                session.set_prompt(line.strip())
            chunk = session.step()
            video.write(chunk.frames)
            print(f"chunk {chunk.index}, prompt {chunk.prompt_id}: {len(chunk.frames)} frames", flush=True)
    print(f"{video.frames} frames in {out}")


if __name__ == "__main__":
    (by_keys if sys.stdin.isatty() else by_lines)(*sys.argv[1:] or ["live.mp4"])
