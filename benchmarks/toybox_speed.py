"""Measures toybox on this machine: sustained frames a second with decoding, seconds to the first frames, and seconds of
a cold process.

    python benchmarks/toybox_speed.py
    python benchmarks/toybox_speed.py --against runs/toybox/weights

Gate: the same seed gives the same video twice, and the first frames of a longer one. Times follow; the last line is
JSON. With --against whole videos of two models alternate, in processor time of one thread, which a busy machine changes
less.
"""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click
import numpy as np
import torch
from videos import video_of

from causalrope_sp import CausalVideoPipeline

PROMPT = "a red circle bounces and a blue square slides right"
GOALS = {"fps": 24.0, "first_frame_s": 0.7, "cold_process_s": 15.0}


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--model", default="toybox", show_default=True, help="The model: a name, a folder or a file.")
@click.option("--frames", default=241, show_default=True, type=click.IntRange(1), help="Pixel frames of each video.")
@click.option(
    "--runs",
    default=3,
    show_default=True,
    type=click.IntRange(1),
    help="Runs of all that is timed.",
)
@click.option("--against", help="Compare the processor time of videos with that of this model; not done by default.")
def main(model: str, frames: int, runs: int, against: str | None) -> None:
    """Measures how fast a model makes a video on this machine's processor."""
    pipe = CausalVideoPipeline.from_pretrained(model)
    other = None if against is None else CausalVideoPipeline.from_pretrained(against)
    gate(pipe)

    first, rate = [], []
    for _ in range(runs):
        started = time.perf_counter()
        for chunk in pipe.stream(PROMPT, num_frames=frames):
            if chunk.index == 0:
                first.append(time.perf_counter() - started)
        rate.append(frames / (time.perf_counter() - started))
    cold = []
    for _ in range(runs):
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "causalrope_sp", "generate", PROMPT, "--model", model]
            started = time.perf_counter()
            subprocess.run([*command, "--out", str(Path(folder) / "video.mp4")], check=True, capture_output=True)
            cold.append(time.perf_counter() - started)

    result = {
        "fps": round(statistics.median(rate), 1),
        "first_frame_s": round(statistics.median(first), 3),
        "cold_process_s": round(statistics.median(cold), 2),
        "frames": frames,
        "threads": torch.get_num_threads(),
        "processor": platform.processor() or platform.machine(),
    }
    if other is not None:
        gate(other)
        ratios = compare(pipe, other, frames, runs)
        result |= {"against": against, "processor_time_ratios": ratios}
        median = statistics.median(ratios)
        print(f"processor time of {model} over {against}: {median:.3f} ({min(ratios)} to {max(ratios)})")
    for name, goal in GOALS.items():
        print(f"{name:>16} {result[name]:>8}  (goal {'at least' if name == 'fps' else 'at most'} {goal})")
    print(json.dumps(result))


def gate(pipe: CausalVideoPipeline) -> None:
    short, again, longer = (np.asarray(video_of(pipe, PROMPT, num_frames=count)) for count in (20, 20, 41))
    assert np.array_equal(short, again), "the same seed gave another video"
    assert np.array_equal(short, longer[:20]), "a longer video begins otherwise"


def compare(one: CausalVideoPipeline, other: CausalVideoPipeline, frames: int, runs: int) -> list[float]:
    """Returns the processor time of each video of the one over that of the other; which comes first alternates."""
    threads, took = torch.get_num_threads(), dict[int, list[float]]({0: [], 1: []})
    torch.set_num_threads(1)  # processor time counts threads that spin while they wait
    for run in range(runs):
        for which in (0, 1) if run % 2 else (1, 0):
            started = time.process_time()
            video_of((one, other)[which], PROMPT, num_frames=frames)
            took[which].append(time.process_time() - started)
    torch.set_num_threads(threads)
    return [round(a / b, 3) for a, b in zip(took[0], took[1], strict=True)]


if __name__ == "__main__":
    main()
