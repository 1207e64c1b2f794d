"""A user's script under torchrun: streams a video into a file, by the library's own writer. `run.py` injects faults
into it.

torchrun --nproc-per-node 2 benchmarks/faults/script.py OUT FRAMES [pause S | raise RANK CHUNK]
"""

from __future__ import annotations

import sys
import time

from causalrope_sp import CausalVideoPipeline, SequenceParallel
from causalrope_sp.io.video_writer import VideoWriter


def main(out: str, frames: int, *fault: str) -> None:
    """Streams so many frames; `pause` waits between chunks, `raise` ends one rank at one chunk."""
    parallel = SequenceParallel.from_env(device="cpu")
    pipe = CausalVideoPipeline.from_pretrained("toybox", parallel=parallel)
    chunks = pipe.stream("a red circle slides right", num_frames=frames)
    writer = VideoWriter(out, pipe.height, pipe.width, pipe.fps) if parallel.rank == 0 else None
    for chunk in chunks:
        if writer is not None and chunk.frames is not None:
            writer.write(chunk.frames)
        if fault[:1] == ("pause",):
            time.sleep(float(fault[1]))
        if fault[:1] == ("raise",) and (parallel.rank, chunk.index) == (int(fault[1]), int(fault[2])):
            raise RuntimeError("a fault of the user's script")
    if writer is not None:
        writer.close()
    parallel.close()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), *sys.argv[3:])
