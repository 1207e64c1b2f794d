"""Chunks in parallel (toybox-vin) against full attention, the autoregressive sampler, and itself without its parts.

    python benchmarks/vin.py --sheet docs/vin.png

Every way makes the same prompts (seed 7, as in toybox_quality.py) at each length and is measured from decoded frames at
the seams of toybox-vin's chunks; rendered scenes through the codec, which have no seams, say what those measures cannot
go below. FLOPs are counted by formula (checked against torch's counter in tests/test_vin.py). Times are of the sampler
alone, at P ranks of one thread, after the gate: the latents are those of one rank to 1e-5. Tables, then JSON.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np
import torch
from PIL import Image, ImageDraw
from printed import finish, print_table, stop
from toybox_quality import draw_scenes
from vin_measures import measure

from causalrope_sp import CausalVideoPipeline, LatentGrid, SamplerConfig, SequenceParallel, sample_chunks
from causalrope_sp.codec.pixels import to_uint8
from causalrope_sp.config import PRESETS, DiTConfig, StreamConfig
from causalrope_sp.grid import split_into_chunks
from causalrope_sp.noise import keyed_generator, seeded_noise
from causalrope_sp.parallel.cost import Workload, cross_flops
from causalrope_sp.parallel.launch import RankPool
from causalrope_sp.toybox.judge import judge, summarize
from causalrope_sp.toybox.prompts import SceneSpec
from causalrope_sp.toybox.scenes import PLACE_VARIABLES, render
from causalrope_sp.vin import PAPER_CHUNKS, PAPER_VIN, TogetherConfig, sample_together
from causalrope_sp.vin.chunks import LaneChunks, cut
from causalrope_sp.vin.cost import full_flops, together_flops

if TYPE_CHECKING:
    import torch.distributed as dist

    from causalrope_sp.vin.video import Together

WAYS = ("VIN", "full attention", "autoregressive", "VIN without global tokens", "VIN without fusion")
TRUTH = "rendered, through the codec"
MEASURES = ("cut", "position", "velocity", "color", "period", "lost")
TIMED_STEPS, TIMED_CHUNKS = 3, 8
SHOWN, TILE, LABEL = 17, 64, 190


class Ways:
    """The models, loaded once, and a video of each way."""

    def __init__(self) -> None:
        self.vin = CausalVideoPipeline.from_pretrained("toybox-vin", parallel_chunks="vin")
        self.flow = CausalVideoPipeline.from_pretrained("toybox-flow")
        assert self.vin.together is not None, "asked for"
        self.together: Together = self.vin.together

    def video(self, way: str, scene: SceneSpec, frames: int, seed: int) -> np.ndarray:
        """uint8 (T, H, W, 3)."""
        if way == TRUTH:
            return self._rendered(scene, frames, seed)
        if way == "autoregressive":
            made = self.flow(scene.prompt(), frames=frames, seed=seed)
            assert made is not None, "one rank"
            return made
        pipe, count = self.vin, latent_frames(frames)
        channels = pipe.model.config.in_channels
        opening = pipe.text.opening(channels, pipe.grid.latent_height, pipe.grid.latent_width)
        vin, chunks = settings(way, self.together, count)
        noise = seeded_noise(seed, (1, channels, pipe.grid.latent_height, pipe.grid.latent_width))
        for moment in sample_together(
            pipe.model,
            vin,
            pipe.text.encode(scene.prompt(), seed),
            noise,
            pipe.grid,
            count,
            chunks=chunks,
            sampler=pipe.recipe.sampler,
            initial_latents=opening,
        ):
            latents = moment.latents
        assert latents is not None, "the last step has the video"
        return to_uint8(pipe.codec.decoder().decode(latents))[0][:frames]

    @torch.inference_mode()
    def _rendered(self, scene: SceneSpec, frames: int, seed: int) -> np.ndarray:
        places = torch.rand(1, PLACE_VARIABLES, generator=keyed_generator(seed))
        whole = 4 * (latent_frames(frames) - 1) + 1
        pixels = render([scene], places, torch.arange(whole), self.vin.height).transpose(1, 2) * 2 - 1
        latents = self.vin.codec.encoder().encode(pixels)
        return to_uint8(self.vin.codec.decoder().decode(latents))[0][:frames]

    def seams(self, frames: int) -> list[int]:
        """The first pixel frame of every chunk's own latent frames, but the first chunk's."""
        chunks = cut(latent_frames(frames), self.together.chunks)
        own = [LaneChunks(chunks, self.together.chunks, n, len(chunks)).owned.start for n in range(1, len(chunks))]
        return [1 + 4 * (frame - 1) for frame in own]


def latent_frames(frames: int) -> int:
    return 1 - (1 - frames) // 4


def settings(way: str, together: Together, frames: int) -> tuple[Any, TogetherConfig]:
    """The network, or None, and the chunks of a way that makes a video at once."""
    if way == "full attention":
        return None, replace(together.chunks, chunk_frames=frames)
    if way == "VIN without global tokens":
        return None, together.chunks
    if way == "VIN without fusion":
        return together.vin, replace(together.chunks, fuse_above=1.0)
    return together.vin, together.chunks


def autoregressive_flops(config: DiTConfig, grid: LatentGrid, stream: StreamConfig, frames: int, steps: int) -> int:
    """Every chunk's denoise passes and its context pass, of which the last chunk has none."""
    work = Workload(config, grid, stream.window or frames, stream.chunk_frames, steps)
    total, chunks = 0, list(split_into_chunks(frames, stream.chunk_frames, start=1))
    for chunk in chunks:
        tokens, keys = chunk.frames * grid.tokens, min(chunk.stop, work.window) * grid.tokens
        attention = 4 * config.num_layers * tokens * keys * config.dim
        time_ = 2 * chunk.frames * config.dim * (config.freq_dim + 7 * config.dim)
        passes = steps if chunk == chunks[-1] else steps + 1
        total += passes * (work.linear_flops * tokens + cross_flops(work, tokens) + attention + time_)
    return total


def flops_of(way: str, ways: Ways, frames: int) -> int:
    """FLOPs of a whole video."""
    config, grid, count = ways.vin.model.config, ways.vin.grid, latent_frames(frames)
    steps = len(ways.vin.recipe.sampler.steps)
    if way == "autoregressive":
        recipe = ways.flow.recipe
        return autoregressive_flops(config, grid, recipe.stream, count, len(recipe.sampler.steps))
    if way == "full attention":
        return steps * full_flops(config, grid, count, given=1)
    vin, chunks = settings(way, ways.together, count)
    return steps * together_flops(config, vin and vin.config, grid, count, chunks, given=1)


def timed(group: dist.ProcessGroup | None, device: str, way: str, frames: int) -> tuple[float, torch.Tensor]:
    """Seconds of a whole video by this way on these ranks, from the best of some steps or chunks, and some latents."""
    torch.set_num_threads(1)
    ways = Ways()
    pipe, ranks = ways.vin, 1 if group is None else group.size()
    config, grid, count = pipe.model.config, pipe.grid, latent_frames(frames)
    noise = seeded_noise(0, (1, config.in_channels, grid.latent_height, grid.latent_width))
    embeds = torch.zeros(1, config.text_len, config.text_dim)
    opening = pipe.text.opening(config.in_channels, grid.latent_height, grid.latent_width)
    steps, took, latents = pipe.recipe.sampler.steps, [], None
    if way == "autoregressive":
        recipe = ways.flow.recipe
        parts = sample_chunks(
            ways.flow.model, embeds, noise, grid, 3 * min(TIMED_CHUNKS, -(-count // 3)), stream=recipe.stream,
            sampler=recipe.sampler, parallel=SequenceParallel(group, device=device), initial_latents=opening,
        )  # fmt: skip
        clock = time.perf_counter()
        for part in parts:
            latents = part.latents.clone()
            took.append(time.perf_counter() - clock)
            clock = time.perf_counter()
        return sorted(took)[len(took) // 2] * -(-count // 3), latents
    vin, chunks = settings(way, ways.together, count)
    lanes = 1 if way == "full attention" else ranks
    few = SamplerConfig(steps[:TIMED_STEPS], pipe.recipe.sampler.shift, "euler")
    parallel = SequenceParallel(group, device=device, lanes=lanes)
    moments = sample_together(
        pipe.model, vin, embeds, noise, grid, count, chunks=chunks, sampler=few, parallel=parallel,
        initial_latents=opening,
    )  # fmt: skip
    clock = time.perf_counter()
    for moment in moments:
        took.append(time.perf_counter() - clock)
        clock, latents = time.perf_counter(), moment.latents
    assert latents is not None, "the last step has the video"
    return min(took[1:]) * len(steps), latents.clone()


def times(lengths: list[int], ranks: list[int]) -> list[dict[str, Any]]:
    rows = []
    with RankPool() as pool:
        for frames in lengths:
            for way in WAYS[:3]:
                row: dict[str, Any] = {"frames": frames, "way": way}
                expected = None
                for count in ranks:
                    seconds, latents = pool.run(timed, count, way, frames)
                    expected = latents if expected is None else expected
                    error = float((latents - expected).norm() / expected.norm())
                    assert error < 1e-5, f"{way} at {count} ranks differs from {ranks[0]} by {error:.1e}"
                    row[f"P={count}"] = round(seconds, 2)
                rows.append(row)
    return rows


def quality(ways: Ways, lengths: list[int], scenes: list[SceneSpec], keep: Callable[..., None]) -> list[dict[str, Any]]:
    rows = []
    for frames in lengths:
        for way in (*WAYS, TRUTH):
            verdicts, found = [], []
            for seed, scene in enumerate(scenes):
                video = ways.video(way, scene, frames, seed)
                keep(way, frames, seed, video)
                verdicts += judge(video, scene)
                found.append(measure(video, scene, ways.seams(frames)))
            shares = {name: round(value, 3) for name, value in summarize(verdicts).items()}
            values = {name: np.array([each[name] for each in found], float) for name in MEASURES}
            means = {n: round(float(np.nanmean(v)), 3) if np.isfinite(v).any() else None for n, v in values.items()}
            flops = None if way == TRUTH else flops_of(way, ways, frames)
            rows.append({"frames": frames, "way": way, "flops": flops, "judged": shares, "measured": means})
            click.echo(f"{frames} frames, {way}: {shares} {means}", err=True)
    return rows


def large_flops() -> dict[str, float]:
    """Saved against full attention by the paper's sizes beside Wan 2.1 1.3B at 480×832, by formula alone."""
    config, grid = PRESETS["wan2.1-1.3b"], LatentGrid.from_pixels(480, 832, 8)
    saved = {}
    for frames in (20, 40, 80):
        of_full = together_flops(config, PAPER_VIN, grid, frames, PAPER_CHUNKS) / full_flops(config, grid, frames)
        saved[str(frames)] = round(1 - of_full, 3)
    return saved


def sheet(rows: list[tuple[str, np.ndarray]], seams: list[int]) -> Image.Image:
    """Frames evenly spaced over each video; a white tick stands over a frame that begins a chunk's own."""
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
@click.option("--lengths", default="64,128,256", show_default=True, help="pixel frames")
@click.option("--prompts", default=8, show_default=True, type=click.IntRange(1))
@click.option("--ranks", default="1,2,4", show_default=True, help="of the times; empty for none")
@click.option("--sheet", "picture", type=click.Path(path_type=Path), help="draws the longest videos of two prompts")
def main(lengths: str, prompts: int, ranks: str, picture: Path | None) -> None:
    try:
        frames, counts = ([int(n) for n in text.split(",") if n] for text in (lengths, ranks))
    except ValueError:
        stop("--lengths and --ranks are whole numbers with commas between them")
    ways, kept = Ways(), dict[tuple[str, int], np.ndarray]()

    def keep(way: str, length: int, seed: int, video: np.ndarray) -> None:
        if length == max(frames) and seed < 2:
            kept[way, seed] = video

    scenes = draw_scenes(prompts)
    print("saved by formula, Wan 2.1 1.3B at 480×832 with the paper's sizes:", large_flops(), "\n")
    rows = quality(ways, frames, scenes, keep)
    base = {row["frames"]: row["flops"] for row in rows if row["way"] == "full attention"}
    columns = ("frames", "way", "GFLOP", "of full", "colour", "shape", "motion", *MEASURES)
    lines = []
    for row in rows:
        cost = (None, None) if row["flops"] is None else (
            f"{row['flops'] / 1e9:.0f}", f"{row['flops'] / base[row['frames']]:.0%}"
        )  # fmt: skip
        judged = [f"{row['judged'][name]:.0%}" for name in ("color", "shape", "motion")]
        lines.append((row["frames"], row["way"], *cost, *judged, *(row["measured"][name] for name in MEASURES)))
    print_table(columns, lines)
    if picture is not None:
        named = [(way, kept[way, seed]) for seed in range(min(2, prompts)) for way in WAYS]
        sheet(named, ways.seams(max(frames))).save(picture)
    timings = times(frames, counts) if counts else []
    if timings:
        print_table(("frames", "way", *(f"P={n}" for n in counts)), [tuple(row.values()) for row in timings])
    finish("vin", prompts=prompts, rows=rows, seconds=timings, saved_by_formula=large_flops())


if __name__ == "__main__":
    main()
