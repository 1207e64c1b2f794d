"""A session that is driven from the keyboard, into a file; while it runs, OUT.partial.mp4 grows and can be played:

python examples/live.py [OUT.mp4]

Keys: r g b y p o (the colour), c s t (the shape), < > ^ v (slides), x bounces, u (take two chunks back), space (pause),
q (end). Where stdin is no terminal, its lines are prompts, one a chunk, and an empty line changes nothing.
"""

from __future__ import annotations

import os
import select
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import click

from causalrope_sp import CausalVideoPipeline, PromptError
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
    return os.read(sys.stdin.fileno(), 1).decode(errors="replace") if select.select([sys.stdin], [], [], 0)[0] else ""


def by_keys(out: str) -> None:
    scene, chunks, key = ("red", "circle", "slides right"), 0, ""
    pipe = CausalVideoPipeline.from_pretrained("toybox")
    with (
        pipe.open("a {} {} {}".format(*scene), history=4) as session,
        VideoWriter(out, pipe.height, pipe.width, pipe.fps) as video,
        keys(),
    ):
        while key != "q":
            changed = COLORS.get(key, scene[0]), SHAPES.get(key, scene[1]), MOTIONS.get(key, scene[2])
            if changed != scene:
                scene = changed
                session.set_prompt("a {} {} {}".format(*scene))
            if key == "u" and chunks >= 2:
                chunks, exact = chunks - 2, session.rewind(2)
                words = (session.prompts[-1].prompt or "").split(maxsplit=3)
                scene = words[1], words[2], words[3]
                print(f"\ntaken back, {'as it was' if exact else 'window computed anew'}")
            if key == " ":
                while (key := pressed()) not in (" ", "q"):
                    time.sleep(0.05)
                key = key.strip()
                continue
            chunk, chunks = session.step(), chunks + 1
            assert chunk.frames is not None  # only ranks above 0 of a parallel run get none
            video.write(chunk.frames)
            print(f"\r{video.frames} frames, {session.prompts[-1].prompt}   ", end="", flush=True)
            key = pressed()
    print(f"\n{video.frames} frames in {out}")


def by_lines(out: str) -> None:
    pipe = CausalVideoPipeline.from_pretrained("toybox")
    with (
        pipe.open("a red circle slides right") as session,
        VideoWriter(out, pipe.height, pipe.width, pipe.fps) as video,
    ):
        for line in sys.stdin:
            if line.strip():
                try:
                    session.set_prompt(line.strip())
                except PromptError as error:
                    print(error)
            chunk = session.step()
            assert chunk.frames is not None
            video.write(chunk.frames)
            print(f"chunk {chunk.index}, prompt {chunk.prompt_id}: {len(chunk.frames)} frames", flush=True)
    print(f"{video.frames} frames in {out}")


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("out", default="live.mp4")
def main(out: str) -> None:
    """Drives a session by single keys, or by lines where stdin is no terminal, into the video OUT (live.mp4)."""
    (by_keys if sys.stdin.isatty() else by_lines)(out)


if __name__ == "__main__":
    main()
