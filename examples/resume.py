"""A session that every run of this script goes on with, each on its own number of ranks:

python examples/resume.py [SESSION.safetensors [OUT.mp4 [CHUNKS]]]
torchrun --standalone --nproc-per-node 2 examples/resume.py [SESSION.safetensors [OUT.mp4 [CHUNKS]]]
"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

from causalrope_sp import CausalVideoPipeline, SequenceParallel
from causalrope_sp.io.video_writer import VideoWriter


def main(file: str = "session.safetensors", out: str = "resumed.mp4", chunks: str = "4") -> None:
    parallel = SequenceParallel.from_env(strategy="auto")
    pipe = CausalVideoPipeline.from_pretrained("toybox", parallel=parallel)
    goes_on = parallel.everyone.first_says(str(Path(file).exists())) == "True"  # what rank 0 sees counts
    session = pipe.resume(file) if goes_on else pipe.open("a red circle slides right", seed=0)
    is_writer = parallel.rank == 0
    with (
        session,
        VideoWriter(out, pipe.height, pipe.width, pipe.fps) if is_writer else contextlib.nullcontext() as video,
    ):
        for _ in range(int(chunks)):
            chunk = session.step()  # every rank takes part in every chunk
            if video is not None and chunk.frames is not None:
                video.write(chunk.frames)
        session.save(file)
    if is_writer:
        begun = "goes on with" if goes_on else "begins"
        print(f"{begun} {file} (ranks: {parallel.size}): chunks up to {chunk.index} are saved", flush=True)
    parallel.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
