"""Runs one endless toybox session for many frames, with a new prompt every 200, and looks at what grows or drifts.

    python benchmarks/soak.py [--frames 20000] [--rope relative]
    torchrun --nproc-per-node 2 benchmarks/soak.py --dtype float64 --out two.npy  # frames, to compare

Latency is the processor time of a chunk without a new prompt: the median of the last tenth over that of the first.
Memory is the resident set of this process, from frame 500 on. Colour is the judge's, over the last 48 frames under each
prompt, by the frame at which it ended. The last line is JSON.
"""

from __future__ import annotations

import os
import statistics
import time
from collections import deque
from pathlib import Path
from typing import Any

import click
import numpy as np
import psutil
import torch
from printed import finish, print_table

from causalrope_sp import CausalVideoPipeline, SequenceParallel
from causalrope_sp.toybox.judge import judge
from causalrope_sp.toybox.prompts import COLORS, parse_prompt

EVERY, JUDGED = 200, 48  # pixel frames


def prompts() -> list[str]:
    """Single objects whose colour changes from each to the next."""
    shapes, motions = ("circle", "square"), ("slides right", "bounces", "orbits clockwise")
    return [f"a {color} {shapes[n % 2]} {motions[n % 3]}" for n, color in enumerate(COLORS)]


@click.command()
@click.option("--frames", default=20_000, show_default=True)
@click.option("--rope", default="absolute", show_default=True)
@click.option("--dtype", help="Of the model and the codec.")
@click.option(
    "--out", type=click.Path(path_type=Path), help="Write every chunk's frames here, one array after the other."
)
def main(frames: int, rope: Any, dtype: str | None, out: Path | None) -> None:
    torch.set_num_threads(1)
    parallel = SequenceParallel.from_env()
    pipe = CausalVideoPipeline.from_pretrained("toybox", rope=rope, dtype=dtype, parallel=parallel)
    texts, process = prompts(), psutil.Process(os.getpid())
    session = pipe.open(texts[0], seed=0, kept_chunks=16)
    times: list[float] = []
    colors: list[tuple[int, bool]] = []
    written = None if out is None or parallel.rank else out.open("wb")
    recent: deque[np.ndarray] = deque(maxlen=JUDGED)
    made, changed, text, base = 0, 0, 0, 0
    while made < frames:
        if made - changed >= EVERY:
            if recent:
                colors.append((made, all(v.color for v in judge(np.stack(recent), parse_prompt(texts[text])))))
            text, changed = (text + 1) % len(texts), made
            session.set_prompt(texts[text])
            chunk = session.step()  # its time has the new cache in it
        else:
            started = time.process_time()
            chunk = session.step()
            times.append(time.process_time() - started)
        if chunk.frames is not None:
            recent.extend(chunk.frames)
            if written is not None:
                np.save(written, chunk.frames)
        made = chunk.first_frame_index  # the frames before this chunk, which every rank knows
        if not base and made >= 500:
            base = process.memory_info().rss
    grown = process.memory_info().rss - base
    session.close()
    if written is not None:
        written.close()
    parallel.close()
    if parallel.rank:
        return
    tenth = max(1, len(times) // 10)
    ratio = statistics.median(times[-tenth:]) / statistics.median(times[:tenth])
    parts = [
        (low, [right for at, right in colors if low < at <= low + frames // 4]) for low in range(0, frames, frames // 4)
    ]
    table = [(f"{low} to {low + frames // 4}", f"{sum(rights)} of {len(rights)}") for low, rights in parts]
    print_table(["frames", "colour right"], table)
    print(
        f"latency of the last tenth over the first: {ratio:.3f}; resident memory since frame 500: {grown / 1e6:+.2f} MB"
    )
    finish("soak", frames=frames, rope=rope, latency=ratio, grown_bytes=grown, colors=colors, ranks=parallel.size)


if __name__ == "__main__":
    main()
