"""Attention reused between denoising steps (PAB): what it saves and what it costs, at the published ranges.

    python benchmarks/reuse.py                        # toybox-flow (16 steps) and toybox (4): runs, and the formulas
    python benchmarks/reuse.py --formulas             # full-size shapes alone, nothing is run
    python benchmarks/reuse.py --policy policy.json   # one more row, of a file that profile-reuse wrote
    python benchmarks/reuse.py --plot docs/reuse.png

Gate: a range of 1 gives the frames of no reuse, bit for bit, or nothing is reported. PSNR and SSIM are against the same
prompts and seeds without reuse; adherence is toybox's judge, from the frames alone. The speed-up is of whole videos,
decoding included, the median over the prompts. FLOPs, bytes and calls are those of the cost model, which tests hold to
torch's counter and to `CommStats`.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median
from typing import Any

import click
import numpy as np
import torch
from pictures import psnr, ssim
from printed import finish, print_table, stop
from videos import video_of

from causalrope_sp import CausalVideoPipeline, LatentGrid, SamplerConfig, StreamConfig
from causalrope_sp.codec.wan_vae_config import PUBLISHED
from causalrope_sp.config import PRESETS
from causalrope_sp.diffusion.schedule import timesteps
from causalrope_sp.planning.cost import plan
from causalrope_sp.planning.machines import H100
from causalrope_sp.planning.workload import Workload
from causalrope_sp.reuse import Broadcast, ReusePolicy, find_policy
from causalrope_sp.reuse.policy_presets import pyramid
from causalrope_sp.toybox.judge import Verdict, judge, summarize
from causalrope_sp.toybox.prompts import SceneSpec
from causalrope_sp.toybox.scenes import random_scene

RANGES = ((2, 4, 6), (3, 5, 7), (5, 7, 9))
WINDOW = (100, 850)  # timesteps; the published one of a model whose attention is over space and time at once
SEED = 7  # of the prompts, as in toybox_quality.py
RANKS = 8
FULL_SIZE = (("wan2.1-1.3b", 4), ("wan2.1-1.3b", 30), ("wan2.1-14b", 4), ("wan2.1-14b", 30), ("wan2.1-14b", 50))


def policies(files: tuple[Path, ...] = ()) -> dict[str, ReusePolicy]:
    """Those that are compared, by name. Wan's attention takes the spatial range; none of its kinds takes the middle
    one."""
    found = {"/".join(map(str, ranges)): pyramid(*ranges, WINDOW) for ranges in RANGES}
    return found | {path.stem: find_policy(path) for path in files}


def saved(work: Workload, policy: ReusePolicy, sampler: SamplerConfig, ranks: int) -> dict[str, Any]:
    """Shares of a steady chunk's FLOPs, and per strategy of its bytes and calls, that reuse saves; GB it keeps."""
    reusing = Workload.of(
        work.config,
        work.grid,
        StreamConfig(work.window, 0, work.chunk_frames),
        sampler,
        work.window,
        itemsize=work.itemsize,
        reuse=policy,
    )
    found: dict[str, Any] = {}
    for before, after in zip(plan(work, ranks, H100), plan(reusing, ranks, H100), strict=True):
        if before.strategy in ("ulysses", "gather-kv", "single"):
            found[before.strategy] = {
                "flops_saved": 1 - after.flops_per_chunk / before.flops_per_chunk,
                "bytes_saved": 1 - after.bytes_per_chunk / before.bytes_per_chunk if ranks > 1 else 0.0,
                "calls": [before.collectives_per_chunk, after.collectives_per_chunk],
                "stored_gb": after.stored_bytes / 1e9,
                "predicted_speed_up": before.chunk_ms / after.chunk_ms,
            }
    return found


def full_size(named: dict[str, ReusePolicy]) -> list[dict[str, Any]]:
    """Formulas at 480×832, window 21, on 8 ranks; nothing is run."""
    rows = []
    for name, steps in FULL_SIZE:
        config = PRESETS[name]
        grid = LatentGrid.from_pixels(480, 832, PUBLISHED[config.in_channels].scale_factor_spatial)
        sampler = SamplerConfig(tuple(timesteps(steps)), shift=5.0)
        work = Workload.of(config, grid, StreamConfig(21, 0, 3), sampler, 21)
        for label, policy in named.items():
            for strategy, values in saved(work, policy, sampler, RANKS).items():
                rows.append({"model": name, "steps": steps, "ranges": label, "strategy": strategy, **values})
    return rows


def draw_scenes(count: int) -> list[SceneSpec]:
    """The first different scenes that the seed draws."""
    generator = torch.Generator().manual_seed(SEED)
    scenes: dict[SceneSpec, None] = {}
    while len(scenes) < count:
        scenes[random_scene(generator)] = None
    return list(scenes)


@dataclass
class PolicyRun:
    """The videos of one policy, the seconds that each took, and what the judge says of them."""

    videos: list[np.ndarray] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    verdicts: list[Verdict] = field(default_factory=list)


def make(
    pipe: CausalVideoPipeline, scenes: list[SceneSpec], frames: int, named: dict[str, ReusePolicy | None]
) -> dict[str, PolicyRun]:
    """Every scene by every policy in turn, so that whatever else the machine does slows all of them alike."""
    made = {label: PolicyRun() for label in named}
    for seed, scene in enumerate(scenes):
        for label, policy in named.items():
            started = time.perf_counter()
            video = video_of(pipe, scene.prompt(), num_frames=frames, seed=seed, reuse=policy)
            made[label].seconds.append(time.perf_counter() - started)
            made[label].videos.append(video)
            made[label].verdicts += judge(video, scene)
    return made


def gate(pipe: CausalVideoPipeline, prompt: str) -> None:
    """A range of 1 is no reuse, bit for bit."""
    ones = ReusePolicy((Broadcast("self", 1), Broadcast("cross", 1), Broadcast("mlp", 1)))
    plain, reused = (video_of(pipe, prompt, num_frames=21, reuse=policy) for policy in (None, ones))
    if not np.array_equal(plain, reused):
        stop("a range of 1 does not give what no reuse gives: nothing is reported")


def run_model(name: str, prompts: int, frames: int, named: dict[str, ReusePolicy]) -> list[dict[str, Any]]:
    pipe, scenes = CausalVideoPipeline.from_pretrained(name, device="cpu"), draw_scenes(prompts)
    gate(pipe, scenes[0].prompt())
    stream, sampler = pipe.config.stream, pipe.config.sampler
    work = Workload.of(pipe.model.config, pipe.settings().grid, stream, sampler, stream.window or 0, itemsize=4)
    made = make(pipe, scenes, frames, {"none": None, **named})
    plain, rows = made["none"], []
    for label, found in made.items():
        row = {"model": name, "steps": len(sampler.steps), "ranges": label, "seconds": median(found.seconds)}
        row |= {
            kind: share for kind, share in summarize(found.verdicts).items() if kind in ("color", "shape", "motion")
        }
        if label != "none":
            pairs = list(zip(found.videos, plain.videos, strict=True))
            close = [psnr(*pair) for pair in pairs]
            row |= {"psnr_db": fmean(close), "worst_psnr_db": min(close), "ssim": fmean(ssim(*pair) for pair in pairs)}
            row |= {"speed_up": median(a / b for a, b in zip(plain.seconds, found.seconds, strict=True))}
            alone, two = (saved(work, named[label], sampler, ranks) for ranks in (1, 2))
            row |= {"flops_saved": alone["single"]["flops_saved"], "bytes_saved_2_ranks": two["ulysses"]["bytes_saved"]}
        rows.append(row)
    return rows


def show(rows: list[dict[str, Any]], formulas: list[dict[str, Any]]) -> None:
    if rows:
        qualities = ("speed-up", "PSNR dB", "worst", "SSIM", "colour", "shape", "motion")
        columns = ("model", "steps", "ranges", "FLOPs saved", "bytes saved, 2 ranks", *qualities)
        print_table(columns, (_cells(row) for row in rows))
    compared = ("model", "steps", "ranges", f"strategy, {RANKS} ranks", "FLOPs saved", "bytes saved", "calls a chunk")
    print_table(
        (*compared, "kept, GB", "speed-up, predicted for H100s"),
        (
            [
                *(row[name] for name in ("model", "steps", "ranges", "strategy")),
                f"{row['flops_saved']:.1%}",
                f"{row['bytes_saved']:.1%}",
                f"{row['calls'][0]} → {row['calls'][1]}",
                f"{row['stored_gb']:.2f}",
                f"{row['predicted_speed_up']:.2f}",
            ]
            for row in formulas
        ),
    )


def _cells(row: dict[str, Any]) -> list[object]:
    def cell(name: str, form: str) -> str | None:
        return format(row[name], form) if name in row else None

    return [
        *(row[name] for name in ("model", "steps", "ranges")),
        cell("flops_saved", ".1%"),
        cell("bytes_saved_2_ranks", ".1%"),
        cell("speed_up", ".2f"),
        cell("psnr_db", ".1f"),
        cell("worst_psnr_db", ".1f"),
        cell("ssim", ".3f"),
        *(cell(name, ".0%") for name in ("color", "shape", "motion")),
    ]


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """The trade: what is saved against what it costs."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.4), constrained_layout=True)
    for name in dict.fromkeys(row["model"] for row in rows):
        found = [row for row in rows if row["model"] == name and "psnr_db" in row]
        label = f"{name}, {found[0]['steps']} steps"
        for axis, kind in zip(axes, ("psnr_db", "ssim"), strict=True):
            places = [(100 * row["flops_saved"], row[kind]) for row in found]
            (line,) = axis.plot(*zip(*places, strict=True), "o", label=label)
            for row, place in zip(found, places, strict=True):
                words = {"xytext": (4, 3), "textcoords": "offset points", "fontsize": 7, "color": line.get_color()}
                axis.annotate(row["ranges"], place, **words)
    for axis, label in zip(axes, ("PSNR against no reuse, dB", "SSIM against no reuse"), strict=True):
        axis.set(xlabel="FLOPs of a chunk saved, %", ylabel=label)
        axis.margins(0.2)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--models", default="toybox-flow,toybox", show_default=True, help="Embedded models to run.")
@click.option("--prompts", default=12, show_default=True, type=click.IntRange(1))
@click.option("--frames", default=81, show_default=True, type=click.IntRange(1), help="Pixel frames of each video.")
@click.option("--policy", "files", multiple=True, type=click.Path(exists=True, path_type=Path), help="One more row.")
@click.option("--formulas", is_flag=True, help="Full-size shapes alone; nothing is run.")
@click.option("--plot", type=click.Path(path_type=Path), help="Draws the trade into this file.")
def main(models: str, prompts: int, frames: int, files: tuple[Path, ...], formulas: bool, plot: Path | None) -> None:
    """Measures what reuse saves and costs; tables, then one line of JSON."""
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for name in () if formulas else models.split(","):
        rows += run_model(name, prompts, frames, policies(files))
    counted = full_size(policies())
    show(rows, counted)
    if plot is not None and rows:
        draw(rows, plot)
    finish("reuse", prompts=prompts, frames=frames, window=WINDOW, rows=rows, full_size=counted)


if __name__ == "__main__":
    main()
