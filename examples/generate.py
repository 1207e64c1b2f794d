"""Generates a video from a prompt, chunk by chunk: python examples/generate.py ["PROMPT" [OUT.mp4 [FRAMES]]]"""

from __future__ import annotations

import click

from causalrope_sp import CausalVideoPipeline
from causalrope_sp.io.video_writer import VideoWriter


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("prompt", default="a red circle slides right")
@click.argument("out", default="generated.mp4")
@click.argument("frames", default=81, type=click.IntRange(1))
def main(prompt: str, out: str, frames: int) -> None:
    """Generates FRAMES pixel frames (81) of PROMPT, chunk by chunk, to the video OUT (generated.mp4)."""
    pipe = CausalVideoPipeline.from_pretrained("toybox")  # or a folder, or a file
    with VideoWriter(out, pipe.height, pipe.width, pipe.fps) as video:
        for chunk in pipe.stream(prompt, num_frames=frames, seed=0):
            assert chunk.frames is not None  # uint8, T×H×W×3; only ranks above 0 of a parallel run get none
            video.write(chunk.frames)
            print(f"chunk {chunk.index}: {len(chunk.frames)} frames in {1000 * chunk.timings.total:.0f} ms")
    print(f"{video.frames} frames in {out}")


if __name__ == "__main__":
    main()
