"""One stream on many processes; rank 0 gets the frames as they are made:

torchrun --standalone --nproc-per-node 2 examples/stream_sp.py ["PROMPT" [OUT.mp4 [FRAMES]]]
"""

from __future__ import annotations

import contextlib

import click

from causalrope_sp import CausalVideoPipeline, SequenceParallel
from causalrope_sp.io.video_writer import VideoWriter


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("prompt", default="a blue square bounces")
@click.argument("out", default="streamed.mp4")
@click.argument("frames", default=81, type=click.IntRange(1))
def main(prompt: str, out: str, frames: int) -> None:
    """Generates FRAMES pixel frames (81) of PROMPT on all processes, to the video OUT (streamed.mp4)."""
    parallel = SequenceParallel.from_env(strategy="auto")
    pipe = CausalVideoPipeline.from_pretrained("toybox", parallel=parallel)
    is_writer = parallel.rank == 0
    with VideoWriter(out, pipe.height, pipe.width, pipe.fps) if is_writer else contextlib.nullcontext() as video:
        for chunk in pipe.stream(prompt, num_frames=frames, seed=0):  # every rank takes part in every chunk
            if video is None or chunk.frames is None:
                continue
            video.write(chunk.frames)
            print(f"chunk {chunk.index}: {len(chunk.frames)} frames in {1000 * chunk.timings.total:.0f} ms", flush=True)
    if video is not None:
        print(f"{video.frames} frames from {parallel.size} ranks in {out}", flush=True)
    parallel.close()


if __name__ == "__main__":
    main()
