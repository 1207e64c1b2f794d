"""Chunks in parallel (toybox-vin) against full attention, the autoregressive sampler, and itself without its parts.

    python benchmarks/vin.py --prompts 4
    python benchmarks/vin.py --prompts 48 --lengths 256 --ranks "" --variants VIN --open nothing,colours

Every variant makes the same prompts (seed 7, as in toybox_quality.py) at each length; decoded frames are measured at
the seams of toybox-vin's chunks; rendered scenes through the codec, which have no seams, say what those measures cannot
go below. toybox's text says which colours there are and where objects start, which lets chunks agree without knowing of
one another; so VIN and its ablations make the longest videos again from texts that leave the one or the other open.
Where VIN and VIN without global tokens are both compared, held-out videos, noised, say by how much global tokens lower
the error of the velocity. FLOPs are counted by formula (held against torch's counter in tests/vin). Times are of the
sampler alone, at P ranks of one thread, after the gate: the latents are those of one rank to 1e-5. Tables, then JSON.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from functools import cache
from statistics import median
from typing import TYPE_CHECKING, Any

import click
import numpy as np
import torch
from printed import finish, print_table, stop
from toybox_quality import draw_scenes
from vin_measures import agreement, measure
from vin_variants import OPEN, TRUTH, VARIANTS, Variants, flops_of, held_out, large_flops, latent_frames, settings

from causalrope_sp import SequenceParallel, sample_chunks
from causalrope_sp.diffusion.noise import seeded_noise
from causalrope_sp.distributed.launch import RankPool
from causalrope_sp.toybox.judge import judge, summarize
from causalrope_sp.toybox.prompts import SceneSpec
from causalrope_sp.vin import sample_parallel_chunks

if TYPE_CHECKING:
    import torch.distributed as dist

OF_ANY_COLOR = ("cuts", "one_background", "colors_in_common")  # what can be measured where texts name no colours
MEASURES = {  # by their headings
    "cuts": "cuts",
    "position": "position, % of frame",
    "velocity": "velocity, % a frame",
    "color": "colour, of 255",
    "position_period_later": "a period later, % of frame",
    "not_found": "frames without the object",
    "one_background": "one background",
    "colors_in_common": "colours in common",
}
RIGHT = {"color": "colour right", "shape": "shape right", "motion": "motion right"}
TIMED_CHUNKS = 8  # of the autoregressive sampler


@cache
def _loaded() -> Variants:
    """Once a process."""
    return Variants()


def timed(group: dist.ProcessGroup | None, device: str, variant: str, frames: int) -> tuple[float, torch.Tensor]:
    """Returns the seconds of a whole video by a variant on these ranks, and its latents (of the autoregressive sampler
    those of the last chunk that it made). Seconds are medians of steps, or of chunks, times their number."""
    torch.set_num_threads(1)
    variants = _loaded()
    pipe, ranks = variants.vin, 1 if group is None else group.size()
    config, grid, count = pipe.model.config, pipe.settings().grid, latent_frames(frames)
    noise = seeded_noise(0, (1, config.in_channels, grid.latent_height, grid.latent_width))
    embeds = torch.zeros(1, config.text_len, config.text_dim)
    opening = pipe.text.opening(config.in_channels, grid.latent_height, grid.latent_width)
    took, clock = list[float](), time.perf_counter()
    if variant == "autoregressive":
        flow = variants.flow.config
        parts = sample_chunks(
            variants.flow.model, embeds, noise, grid, 3 * min(TIMED_CHUNKS, -(-count // 3)), stream=flow.stream,
            sampler=flow.sampler, parallel=SequenceParallel(group, device=device), initial_latents=opening,
        )  # fmt: skip
        for part in parts:
            last = part.latents.clone()
            took.append(time.perf_counter() - clock)
            clock = time.perf_counter()
        return median(took) * -(-count // 3), last
    vin, chunks = settings(variant, variants.parallel_chunks, count)
    chunk_ranks = 1 if variant == "full attention" else ranks
    parallel = SequenceParallel(group, device=device, chunk=chunk_ranks)
    outputs = sample_parallel_chunks(
        pipe.model, vin, embeds, noise, grid, count, chunks=chunks, sampler=pipe.config.sampler, parallel=parallel,
        initial_latents=opening,
    )  # fmt: skip
    for output in outputs:
        took.append(time.perf_counter() - clock)
        clock, latents = time.perf_counter(), output.latents
    assert latents is not None, "the last step has the video"
    return median(took) * len(took), latents.clone()


def times(lengths: list[int], ranks: list[int]) -> list[dict[str, Any]]:
    rows = []
    with RankPool() as pool:
        for frames in lengths:
            for variant in VARIANTS[:3]:
                row: dict[str, Any] = {"frames": frames, "variant": variant}
                expected = None
                for count in ranks:
                    seconds, latents = pool.run(timed, count, variant, frames)
                    expected = latents if expected is None else expected
                    error = float((latents - expected).norm() / expected.norm())
                    assert error < 1e-5, f"{variant} at {count} ranks differs from {ranks[0]} by {error:.1e}"
                    row[f"P={count}"] = round(seconds, 2)
                rows.append(row)
    return rows


def quality(
    variants: Variants, names: Sequence[str], lengths: list[int], scenes: list[SceneSpec], left_open: str
) -> list[dict[str, Any]]:
    rows = []
    for frames in lengths:
        for variant in names:
            verdicts, found = [], []
            for seed, scene in enumerate(scenes):
                video = variants.video(variant, scene, frames, seed, left_open)
                verdicts += [] if left_open == "colours" else judge(video, scene)
                seams = variants.seams(frames)
                found.append(measure(video, scene, seams) | agreement(video, seams))
            shares = {name: round(value, 3) for name, value in summarize(verdicts).items()} if verdicts else None
            values = {name: np.array([each[name] for each in found], float) for name in MEASURES}
            means = {n: round(float(np.nanmean(v)), 3) if np.isfinite(v).any() else None for n, v in values.items()}
            flops = None if variant == TRUTH else flops_of(variant, variants, frames)
            rows.append(
                {
                    "frames": frames,
                    "variant": variant,
                    "open": left_open,
                    "flops": flops,
                    "judged": shares,
                    "measured": means,
                }
            )
            click.echo(f"{frames} frames, {variant}, left open {left_open}: {shares} {means}", err=True)
    return rows


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--lengths", default="64,128,256", show_default=True, help="The numbers of pixel frames, with commas between them."
)
@click.option(
    "--prompts", default=16, show_default=True, type=click.IntRange(0), help="The number of prompts; 0 for times alone."
)
@click.option(
    "--ranks", default="1,2,4", show_default=True, help="The numbers of ranks that are timed; empty for no times."
)
@click.option(
    "--variants",
    "names",
    default=",".join((*VARIANTS, TRUTH)),
    show_default=True,
    help="The variants to compare, with commas between; of open texts those of VIN alone.",
)
@click.option("--open", "opened", default=",".join(OPEN), show_default=True, help="What texts leave open, with commas.")
def main(lengths: str, prompts: int, ranks: str, names: str, opened: str) -> None:
    """Compares chunks in parallel with other ways to sample a video."""
    try:
        frames, counts = ([int(n) for n in text.split(",") if n] for text in (lengths, ranks))
    except ValueError:
        stop("--lengths and --ranks are whole numbers with commas between them")
    if min(frames, default=0) < 64 or (counts and (counts[0] != 1 or min(counts) < 1)):
        stop("--lengths have at least 64 frames, two chunks, and --ranks begin with 1, which the others are held to")
    chosen = [_known("--variants", name, (*VARIANTS, TRUTH)) for name in names.split(",")]
    left_open = [_known("--open", what, OPEN) for what in opened.split(",")]
    if set(left_open) != {"nothing"} and not any(name.startswith("VIN") for name in chosen):
        stop("--open: only the variants of VIN are made from texts that leave something open")
    variants = _loaded()

    scenes = draw_scenes(prompts)
    print("saved by formula, Wan 2.1 1.3B at 480×832 with the paper's sizes:", large_flops(), "\n")
    timings = times(frames, counts) if counts else []
    if timings:
        print_table(("frames", "variant", *(f"P={n}" for n in counts)), [tuple(row.values()) for row in timings])
    rows, errors = list[dict[str, Any]](), list[dict[str, Any]]()
    for what in left_open if prompts else ():
        if what == "nothing":
            rows += quality(variants, chosen, frames, scenes, what)
        else:
            rows += quality(variants, [w for w in chosen if w.startswith("VIN")], [max(frames)], scenes, what)
    if rows:
        print_quality(rows, {n: flops_of("full attention", variants, n) for n in frames})
    if prompts and {"VIN", "VIN without global tokens"} <= set(chosen):
        errors = held_out(variants, scenes, max(frames))
        print_table(
            ("left open", "noise level", "error with global tokens", "without"),
            [(e["open"], e["level"], e["with"], e["without"]) for e in errors],
        )
    finish("vin", prompts=prompts, rows=rows, seconds=timings, held_out=errors, saved_by_formula=large_flops())


def print_quality(rows: list[dict[str, Any]], full: dict[int, int]) -> None:
    """Prints a table of what `quality` returned; `full` are the FLOPs of full attention by the length of the video."""
    columns = ("frames", "variant", "left open", "GFLOP", "of full", *RIGHT.values(), *MEASURES.values())
    lines = []
    for row in rows:
        cost = (None, None) if row["flops"] is None else (
            f"{row['flops'] / 1e9:.0f}", f"{row['flops'] / full[row['frames']]:.0%}"
        )  # fmt: skip
        judged = [f"{row['judged'][name]:.0%}" if row["judged"] else None for name in RIGHT]
        measured = [row["measured"][name] if row["judged"] or name in OF_ANY_COLOR else None for name in MEASURES]
        lines.append((row["frames"], row["variant"], row["open"], *cost, *judged, *measured))
    print_table(columns, lines)


def _known(option: str, name: str, names: Iterable[str]) -> str:
    if name not in names:
        stop(f"{option}: expected one of {', '.join(names)}, not {name!r}")
    return name


if __name__ == "__main__":
    main()
