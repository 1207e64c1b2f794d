"""A session that every run of this script goes on with, each on its own number of ranks:

python examples/resume.py [SESSION.safetensors [OUT.mp4 [CHUNKS]]]
torchrun --standalone --nproc-per-node 2 examples/resume.py [SESSION.safetensors [OUT.mp4 [CHUNKS]]]
"""

from __future__ import annotations

import contextlib
from pathlib import Path

import click

from causalrope_sp import CausalVideoPipeline, SequenceParallel
from causalrope_sp.io.video_writer import VideoWriter


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("file", metavar="[SESSION]", default="session.safetensors")
@click.argument("out", default="resumed.mp4")
@click.argument("chunks", default=4, type=click.IntRange(1))
def main(file: str, out: str, chunks: int) -> None:
    """Goes on with the session of the file SESSION (session.safetensors), or begins it: CHUNKS chunks (4) to the video
    OUT (resumed.mp4)."""
    parallel = SequenceParallel.from_env(strategy="auto")
    pipe = CausalVideoPipeline.from_pretrained("toybox", parallel=parallel)
    goes_on = parallel.everyone.first_says(str(Path(file).exists())) == "True"  # what rank 0 sees counts
    session = pipe.resume(file) if goes_on else pipe.open("a red circle slides right", seed=0)
    is_writer = parallel.rank == 0
    with (
        session,
        VideoWriter(out, pipe.height, pipe.width, pipe.fps) if is_writer else contextlib.nullcontext() as video,
    ):
        for _ in range(chunks):
            chunk = session.step()  # every rank takes part in every chunk
            if video is not None and chunk.frames is not None:
                video.write(chunk.frames)
        session.save(file)
    if is_writer:
        begun = "goes on with" if goes_on else "begins"
        print(f"{begun} {file} (ranks: {parallel.size}): chunks up to {chunk.index} are saved", flush=True)
    parallel.close()


if __name__ == "__main__":
    main()
