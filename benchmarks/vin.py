"""Compares parallel chunks (toybox-vin) with full attention, with the autoregressive sampler, and with its own
ablations.

    python benchmarks/vin.py --sheet docs/vin.png

Every method generates the same prompts (seed 7, as in toybox_quality.py) at each length and is measured from decoded
frames at the seams of toybox-vin's chunks. Rendered scenes through the codec, which have no seams, give the lower bound
of these measures. The text of toybox names colours and start positions, so that chunks can agree without communication;
therefore VIN and its ablations generate the longest videos again, of twice as many prompts, from texts that leave the
one or the other open. Noised held-out videos show by how much global tokens lower the error of the velocity. FLOPs are
counted by formula (which tests/test_vin.py compares with torch's counter). Times are those of the sampler alone, at P
ranks of one thread, after the gate: the latents differ from those of one rank by at most 1e-5, relative. The output is
tables, then JSON.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import click
import numpy as np
import torch
from PIL import Image, ImageDraw
from printed import finish, print_table, stop
from toybox_quality import draw_scenes
from vin_measures import agreement, measure
from vin_ways import OPEN, TRUTH, WAYS, Ways, flops_of, held_out, large_flops, latent_frames, settings

from causalrope_sp import SamplerConfig, SequenceParallel, sample_chunks
from causalrope_sp.diffusion.noise import seeded_noise
from causalrope_sp.distributed.launch import RankPool
from causalrope_sp.toybox.judge import judge, summarize
from causalrope_sp.toybox.prompts import SceneSpec
from causalrope_sp.vin import sample_parallel_chunks

if TYPE_CHECKING:
    import torch.distributed as dist

Keep = Callable[[str, int, int, str, np.ndarray], None]
OF_ANY_COLOR = ("cut", "background", "palette")  # what can be measured where the text names no colours
MEASURES = ("cut", "position", "velocity", "color", "period", "lost", "background", "palette")
TIMED_STEPS, TIMED_CHUNKS = 6, 8
SHOWN, TILE, LABEL = 17, 64, 250


@cache
def _loaded() -> Ways:
    """Loads the models once a process."""
    return Ways()


def timed(group: dist.ProcessGroup | None, device: str, method: str, frames: int) -> tuple[float, torch.Tensor]:
    """Times a method on these ranks: returns the seconds of a whole video, computed from the median of a few steps or
    chunks, and latents for the gate."""
    torch.set_num_threads(1)
    ways = _loaded()
    pipe, ranks = ways.vin, 1 if group is None else group.size()
    config, grid, count = pipe.model.config, pipe.grid, latent_frames(frames)
    noise = seeded_noise(0, (1, config.in_channels, grid.latent_height, grid.latent_width))
    embeds = torch.zeros(1, config.text_len, config.text_dim)
    opening = pipe.text.opening(config.in_channels, grid.latent_height, grid.latent_width)
    steps, took, latents = pipe.model_config.sampler.steps, [], None
    if method == "autoregressive":
        model_config = ways.flow.model_config
        parts = sample_chunks(
            ways.flow.model, embeds, noise, grid, 3 * min(TIMED_CHUNKS, -(-count // 3)), stream=model_config.stream,
            sampler=model_config.sampler, parallel=SequenceParallel(group, device=device), initial_latents=opening,
        )  # fmt: skip
        clock = time.perf_counter()
        for part in parts:
            latents = part.latents.clone()
            took.append(time.perf_counter() - clock)
            clock = time.perf_counter()
        return median(took) * -(-count // 3), latents
    vin, chunks = settings(method, ways.parallel_chunks, count)
    chunk_ranks = 1 if method == "full attention" else ranks
    few = SamplerConfig(steps[:TIMED_STEPS], pipe.model_config.sampler.shift, "euler")
    parallel = SequenceParallel(group, device=device, chunk=chunk_ranks)
    outputs = sample_parallel_chunks(
        pipe.model, vin, embeds, noise, grid, count, chunks=chunks, sampler=few, parallel=parallel,
        initial_latents=opening,
    )  # fmt: skip
    clock = time.perf_counter()
    for output in outputs:
        took.append(time.perf_counter() - clock)
        clock, latents = time.perf_counter(), output.latents
    assert latents is not None, "the last step returns the video"
    return median(took[1:]) * len(steps), latents.clone()


def times(lengths: list[int], ranks: list[int]) -> list[dict[str, Any]]:
    rows = []
    with RankPool() as pool:
        for frames in lengths:
            for method in WAYS[:3]:
                row: dict[str, Any] = {"frames": frames, "way": method}
                expected = None
                for count in ranks:
                    seconds, latents = pool.run(timed, count, method, frames)
                    expected = latents if expected is None else expected
                    error = float((latents - expected).norm() / expected.norm())
                    assert error < 1e-5, f"{method} at {count} ranks differs from {ranks[0]} by {error:.1e}"
                    row[f"P={count}"] = round(seconds, 2)
                rows.append(row)
    return rows


def quality(
    ways: Ways, names: Sequence[str], lengths: list[int], scenes: list[SceneSpec], keep: Keep, left_open: str
) -> list[dict[str, Any]]:
    rows = []
    for frames in lengths:
        for method in names:
            verdicts, found = [], []
            for seed, scene in enumerate(scenes):
                video = ways.video(method, scene, frames, seed, left_open)
                keep(method, frames, seed, left_open, video)
                verdicts += judge(video, scene)
                seams = ways.seams(frames)
                found.append(measure(video, scene, seams) | agreement(video, seams))
            shares = {name: round(value, 3) for name, value in summarize(verdicts).items()}
            values = {name: np.array([each[name] for each in found], float) for name in MEASURES}
            means = {n: round(float(np.nanmean(v)), 3) if np.isfinite(v).any() else None for n, v in values.items()}
            flops = None if method == TRUTH else flops_of(method, ways, frames)
            rows.append(
                {
                    "frames": frames,
                    "way": method,
                    "open": left_open,
                    "flops": flops,
                    "judged": shares,
                    "measured": means,
                }
            )
            click.echo(f"{frames} frames, {method}, left open {left_open}: {shares} {means}", err=True)
    return rows


def sheet(rows: list[tuple[str, np.ndarray]], seams: list[int]) -> Image.Image:
    """Draws evenly spaced frames of each video; a white line marks the first frame that a chunk owns."""
    page = Image.new("RGB", (LABEL + SHOWN * (TILE + 3), len(rows) * (TILE + 5)), (60, 60, 66))
    pen = ImageDraw.Draw(page)
    for row, (name, video) in enumerate(rows):
        top = row * (TILE + 5) + 3
        pen.text((6, top + TILE // 2 - 7), name, fill="white", font_size=12)
        shown = np.linspace(0, len(video) - 1, SHOWN).round().astype(int)
        for column, frame in enumerate(shown):
            left = LABEL + column * (TILE + 3)
            page.paste(Image.fromarray(video[frame]), (left, top))
            if any(abs(frame - seam) < (len(video) - 1) / SHOWN / 2 for seam in seams):
                pen.line((left, top - 2, left + TILE - 1, top - 2), "white", 2)
    return page


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--lengths", default="64,128,256", show_default=True, help="Lengths of the videos in pixel frames.")
@click.option("--prompts", default=8, show_default=True, type=click.IntRange(0), help="Prompts; 0: times alone.")
@click.option("--ranks", default="1,2,4", show_default=True, help="Rank counts to time; empty: none.")
@click.option("--sheet", "picture", type=click.Path(path_type=Path), help="Draw the longest videos of 2 prompts.")
def main(lengths: str, prompts: int, ranks: str, picture: Path | None) -> None:
    try:
        frames, counts = ([int(n) for n in text.split(",") if n] for text in (lengths, ranks))
    except ValueError:
        stop("--lengths and --ranks must be whole numbers separated by commas")
    if min(frames) < 64 or (counts and counts[0] != 1):
        stop("--lengths must be at least 64 frames (two chunks); --ranks must begin with 1, the gate's reference")
    ways, kept = _loaded(), dict[tuple[str, int, str], np.ndarray]()

    def keep(method: str, length: int, seed: int, left_open: str, video: np.ndarray) -> None:
        if length == max(frames) and seed < 2:
            kept[left_open, seed, method] = video

    scenes, many = draw_scenes(prompts), draw_scenes(2 * prompts)
    print("saved by formula, Wan 2.1 1.3B at 480×832 with the paper's sizes:", large_flops(), "\n")
    timings = times(frames, counts) if counts else []
    if timings:
        print_table(("frames", "method", *(f"P={n}" for n in counts)), [tuple(row.values()) for row in timings])
    if not prompts:
        return finish("vin", seconds=timings, saved_by_formula=large_flops())
    rows = quality(ways, (*WAYS, TRUTH), frames, scenes, keep, "nothing")
    for left_open in ("colours", "places"):
        rows += quality(ways, [w for w in WAYS if w.startswith("VIN")], [max(frames)], many, keep, left_open)
    base = {row["frames"]: row["flops"] for row in rows if row["way"] == "full attention"}
    columns = ("frames", "method", "left open", "GFLOP", "of full", "colour", "shape", "motion", *MEASURES)
    lines = []
    for row in rows:
        cost = (None, None) if row["flops"] is None else (
            f"{row['flops'] / 1e9:.0f}", f"{row['flops'] / base[row['frames']]:.0%}"
        )  # fmt: skip
        named = row["open"] != "colours"
        judged = [f"{row['judged'][name]:.0%}" if named else None for name in ("color", "shape", "motion")]
        measured = [row["measured"][name] if named or name in OF_ANY_COLOR else None for name in MEASURES]
        lines.append((row["frames"], row["way"], row["open"], *cost, *judged, *measured))
    print_table(columns, lines)
    errors = held_out(ways, scenes, max(frames))
    print_table(
        ("left open", "noise level", "error with global tokens", "without"),
        [(e["open"], e["level"], e["with"], e["without"]) for e in errors],
    )
    if picture is not None:
        named = [
            (method if left_open == "nothing" else f"{method}, {left_open} open", video)
            for left_open in OPEN
            for seed in range(2)
            for method in WAYS
            if (video := kept.get((left_open, seed, method))) is not None
        ]
        sheet(named, ways.seams(max(frames))).save(picture)
    finish("vin", prompts=prompts, rows=rows, seconds=timings, held_out=errors, saved_by_formula=large_flops())


if __name__ == "__main__":
    main()
