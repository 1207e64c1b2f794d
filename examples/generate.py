"""Generates a video from a prompt, chunk by chunk: python examples/generate.py ["PROMPT" [OUT.mp4 [FRAMES]]]"""

from __future__ import annotations

import sys

from causalrope_sp import CausalVideoPipeline
from causalrope_sp.io.video_writer import VideoWriter


def main(prompt: str = "a red circle slides right", out: str = "generated.mp4", frames: str = "81") -> None:
    pipe = CausalVideoPipeline.from_pretrained("toybox")  # or a folder, or a file
    with VideoWriter(out, pipe.height, pipe.width, pipe.fps) as video:
        for chunk in pipe.stream(prompt, num_frames=int(frames), seed=0):
            assert chunk.frames is not None  # uint8, T×H×W×3; only ranks above 0 of a parallel run get none
            video.write(chunk.frames)
            print(f"chunk {chunk.index}: {len(chunk.frames)} frames in {1000 * chunk.timings.total:.0f} ms")
    print(f"{video.frames} frames in {out}")


if __name__ == "__main__":
    main(*sys.argv[1:])
