"""Toybox's quality, from its decoded frames alone: is each object of a prompt what its words say?

    python benchmarks/toybox_quality.py --model toybox

Prompts are drawn from a generator seeded 7. Training draws its scenes from generators seeded 10,000,000 and above, so
no scene, and no choice made on scenes, comes from this seed. Goals are those that the shipped weights are held to.
Beside them stands what the same judge says of the same scenes as they were rendered, and through the codec, which no
DiT can pass. Prints a table, then one line of JSON; --check turns a goal missed into exit status 1.
"""

from __future__ import annotations

import json
import math
import sys
from collections import defaultdict
from typing import Any

import click
import numpy as np
import torch
from printed import stop
from rich.console import Console
from rich.progress import track
from rich.table import Table
from videos import video_of

from causalrope_sp import CausalRopeError, CausalVideoPipeline
from causalrope_sp.diffusion.noise import keyed_generator
from causalrope_sp.toybox.judge import Verdict, judge, summarize
from causalrope_sp.toybox.prompts import SceneSpec
from causalrope_sp.toybox.scenes import START_VARIABLES, random_scene, render

SEED = 7
GOALS = {"color": 0.97, "shape": 0.90, "motion": 0.93, "all": 0.80, "codec_psnr_db": 30.0}
VERY_LONG = 2000  # frames of a video
LONG_COLOR, VERY_LONG_COLOR = 0.95, 0.90  # the goals of colours at the end of a long and of a very long video
LAST = 16  # the frames of a long video that are judged


def draw_scenes(count: int) -> list[SceneSpec]:
    """The first `count` different scenes that seed 7 draws."""
    generator = torch.Generator().manual_seed(SEED)
    scenes: dict[SceneSpec, None] = {}
    while len(scenes) < count:
        scenes[random_scene(generator)] = None
    return list(scenes)


def judge_pipeline(pipe: CausalVideoPipeline, scenes: list[SceneSpec], frames: int, last: int | None) -> list[Verdict]:
    """Makes a video of every scene (its number is its seed) and judges it, or its last frames."""
    verdicts: list[Verdict] = []
    for seed, scene in enumerate(track(scenes, f"{frames} frames each", console=Console(stderr=True), transient=True)):
        video = video_of(pipe, scene.prompt(), num_frames=frames, seed=seed)
        verdicts += judge(video[-last:] if last else video, scene)
    return verdicts


@torch.inference_mode()
def codec_psnr(pipe: CausalVideoPipeline, scenes: list[SceneSpec], frames: int) -> float:
    """Mean PSNR in dB of rendered scenes against their round trip through the codec."""
    generator = torch.Generator().manual_seed(SEED)
    values = []
    for scene in scenes:
        starts = torch.rand(1, START_VARIABLES, generator=generator)
        pixels = render([scene], starts, torch.arange((frames - 1) // 4 * 4 + 1), pipe.height).transpose(1, 2)
        pixels = pixels.to(pipe.codec.device, pipe.codec.dtype)
        latents = pipe.codec.encoder().encode(2 * pixels - 1)
        back = (pipe.codec.decoder().decode(latents).clamp(-1, 1) + 1) / 2
        values.append(-10 * math.log10(float((back - pixels).float().square().mean())))
    return float(np.mean(values))


@torch.inference_mode()
def judge_truth(pipe: CausalVideoPipeline, scenes: list[SceneSpec], frames: int) -> dict[str, dict[str, float]]:
    """What the judge says of the scenes themselves, as rendered and through the codec, at the starts that the model
    is told."""
    as_rendered, through_codec = list[Verdict](), list[Verdict]()
    for seed, scene in enumerate(scenes):
        starts = torch.rand(1, START_VARIABLES, generator=keyed_generator(seed))
        pixels = render([scene], starts, torch.arange((frames - 1) // 4 * 4 + 1), pipe.height).transpose(1, 2)
        latents = pipe.codec.encoder().encode((2 * pixels - 1).to(pipe.codec.device, pipe.codec.dtype))
        back = (pipe.codec.decoder().decode(latents).float().cpu() + 1) / 2
        for video, verdicts in ((pixels, as_rendered), (back, through_codec)):
            shown = (255 * video[0, :frames].clamp(0, 1)).round().to(torch.uint8).permute(0, 2, 3, 1)
            verdicts += judge(shown.numpy(), scene)
    return {"rendered": summarize(as_rendered), "through_codec": summarize(through_codec)}


def shares_by_word(verdicts: list[Verdict]) -> dict[str, dict[str, float]]:
    """For every word, the share of its objects in which that word's own property is right; of sizes, all three."""
    right: dict[str, dict[str, list[bool]]] = {k: defaultdict(list) for k in ("color", "shape", "motion", "size")}
    for v in verdicts:
        for kind, words in right.items():
            right_here = v.color and v.shape and v.motion if kind == "size" else getattr(v, kind)
            words[getattr(v.spec, kind)].append(right_here)
    return {kind: {word: float(np.mean(r)) for word, r in sorted(words.items())} for kind, words in right.items()}


def print_table(result: dict[str, Any]) -> None:
    table = Table(title=f"{result['model']}: {result['prompts']} prompts, {result['frames']} frames, seed {SEED}")
    columns = ("measured", "left"), ("value", "right"), ("goal", "right"), ("reached", "left")
    for column, side in (*columns, ("rendered", "right"), ("through codec", "right")):
        table.add_column(column, justify=side)  # type: ignore[arg-type]
    names = {
        "color": "colour right",
        "shape": "shape right",
        "motion": "motion right",
        "all": "all three right",
        "background": "background right",
        "codec_psnr_db": "codec round trip, PSNR in dB",
        "long_color": f"colour right after {result['long_frames']} frames",
    }
    for key, name in names.items():
        if result[key] is None:
            continue
        shown = (lambda v: f"{v:.1f}") if key == "codec_psnr_db" else (lambda v: f"{v:.1%}")
        goal = result["goals"].get(key)
        reached = "" if goal is None else ("yes" if result[key] >= goal else "NO")
        truth = ("" if key not in found else shown(found[key]) for found in result["truth"].values())
        table.add_row(name, shown(result[key]), "" if goal is None else shown(goal), reached, *truth)
    console = Console()
    console.print(table)
    for kind, words in result["by_word"].items():
        console.print(f"{kind}: " + ", ".join(f"{word} {share:.0%}" for word, share in words.items()))


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--model", default="toybox", show_default=True, help="The model: a name, a folder or a file.")
@click.option("--prompts", default=48, show_default=True, type=click.IntRange(1), help="The number of prompts.")
@click.option("--frames", default=81, show_default=True, type=click.IntRange(1), help="Pixel frames of each video.")
@click.option(
    "--long-prompts",
    default=12,
    show_default=True,
    type=click.IntRange(0),
    help="The number of prompts that long videos are made of too; 0 for no long videos.",
)
@click.option(
    "--long-frames",
    default=240,
    show_default=True,
    type=click.IntRange(LAST),
    help=f"Pixel frames of each long video, of which the last {LAST} are judged.",
)
@click.option("--window", type=int, help="Latent frames that attention looks back over.  [default: the model's]")
@click.option("--solver", help="The solver.  [default: the model's]")
@click.option("--guidance", type=float, help="The guidance scale.  [default: the model's]")
@click.option("--check", is_flag=True, help="Exit with status 1 if a goal is missed.")
@click.option("--json", "only_json", is_flag=True, help="Print the JSON line alone.")
def main(
    model: str,
    prompts: int,
    frames: int,
    long_prompts: int,
    long_frames: int,
    window: int | None,
    solver: Any,
    guidance: float | None,
    check: bool,
    only_json: bool,
) -> None:
    """Measures the quality of a toybox model."""
    try:
        pipe = CausalVideoPipeline.from_pretrained(model, window=window, solver=solver, guidance_scale=guidance)
    except CausalRopeError as error:
        stop(str(error))
    scenes = draw_scenes(prompts)
    psnr = codec_psnr(pipe, scenes[:16], frames)
    verdicts = judge_pipeline(pipe, scenes, frames, None)
    late = judge_pipeline(pipe, draw_scenes(long_prompts), long_frames, LAST)
    goals = GOALS | {"long_color": LONG_COLOR if long_frames < VERY_LONG else VERY_LONG_COLOR}
    result: dict[str, Any] = {
        "benchmark": "toybox_quality",
        "model": model,
        "seed": SEED,
        "prompts": prompts,
        "frames": frames,
        "height": pipe.height,
        "width": pipe.width,
        "window": pipe.config.stream.window,
        "solver": pipe.config.sampler.solver,
        "guidance": pipe.config.sampler.guidance_scale,
        **summarize(verdicts),
        "codec_psnr_db": psnr,
        "long_prompts": long_prompts,
        "long_objects": len(late),
        "long_frames": long_frames,
        "long_color": summarize(late)["color"] if late else None,
        "goals": goals,
        "truth": judge_truth(pipe, scenes, frames),
        "by_word": shares_by_word(verdicts),
        "wrong": [
            f"{v.spec.color} {v.spec.shape} {v.spec.motion}: saw {v.seen_colors}, {v.seen_shape}, {v.seen_motion}"
            for v in verdicts
            if not (v.color and v.shape and v.motion)
        ],
    }
    result["ok"] = all(result[key] >= goal for key, goal in goals.items() if result[key] is not None)
    if not only_json:
        print_table(result)
    print(json.dumps(result))
    sys.exit(int(check and not result["ok"]))


if __name__ == "__main__":
    main()
