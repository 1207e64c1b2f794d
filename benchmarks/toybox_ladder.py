"""What limits toybox, rung by rung: the judge itself, the codec, one chunk after the truth, a video of its own.

    python benchmarks/toybox_ladder.py --model toybox

Rendered scenes are judged as they are, through the codec, and through the codec with noise on their latents; then what
the model makes of every chunk after the truth's history, and of whole videos. Prompts and seeds are those of
`toybox_quality.py`, or with --development others, on which choices may be made. JSON last.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import click
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from toybox_quality import draw_scenes

from causalrope_sp import CausalVideoPipeline
from causalrope_sp.diffusion.noise import keyed_generator
from causalrope_sp.grid import Chunk, LatentGrid
from causalrope_sp.sampling.sampler import sample_chunks
from causalrope_sp.toybox.chart import chart
from causalrope_sp.toybox.judge import Verdict, judge, summarize
from causalrope_sp.toybox.prompts import SceneSpec
from causalrope_sp.toybox.scenes import START_VARIABLES, random_scene, render
from causalrope_sp.toybox.toybox_text import encode_scene

FRAMES = 81
DEVELOPMENT_SEED = 93_000_000
VISIBLE = 0.3  # how far a latent is from the background's where an object is
AT_ONCE = 16  # videos


def encoded(pipe: CausalVideoPipeline, pixels: Tensor) -> Tensor:
    """Latents (N, F, C, X, X), float32, of videos (N, 3, T, X, X) in [0, 1]."""
    videos = (2 * pixels.transpose(1, 2) - 1).to(pipe.codec.dtype)
    return torch.cat([pipe.codec.encoder().encode(part) for part in videos.split(AT_ONCE)]).float()


def decoded(pipe: CausalVideoPipeline, latents: Tensor, noise: float = 0.0) -> Tensor:
    """Videos (N, T, X, X, 3), uint8."""
    latents = latents + noise * torch.randn(latents.shape, generator=keyed_generator(99))
    parts = [pipe.codec.decoder().decode(part.to(pipe.codec.dtype)) for part in latents.split(1)]
    return as_bytes((torch.cat(parts).float() + 1) / 2)


def as_bytes(pixels_NTCHW: Tensor) -> Tensor:
    return (255 * pixels_NTCHW.clamp(0, 1)).round().to(torch.uint8).permute(0, 1, 3, 4, 2).contiguous()


def sampled(pipe: CausalVideoPipeline, embeds: Tensor, truth: Tensor | None) -> Tensor:
    """The model's latents of 21 frames: every chunk after the truth's history, or without any truth after its own."""
    grid = LatentGrid.from_pixels(pipe.height, pipe.width, pipe.codec.spatial_stride)
    shape, generator = (len(embeds), -1, pipe.codec.channels, grid.latent_height, grid.latent_width), keyed_generator(5)
    still, chunk_frames = chart(len(embeds), *shape[2:]), pipe.config.stream.chunk_frames
    total = (FRAMES - 1) // pipe.codec.temporal_stride + 1

    def noise(chunk: Chunk, _: int) -> Tensor:
        return torch.randn(shape[0], chunk.frames, *shape[2:], generator=generator)

    made = []
    for start in [0] if truth is None else range(0, total, chunk_frames):
        chunks = sample_chunks(
            pipe.model,
            embeds.to(pipe.model.dtype),
            noise,
            grid,
            total if truth is None else chunk_frames,
            stream=pipe.config.stream,
            sampler=pipe.config.sampler,
            initial_latents=still if truth is None else torch.cat([still, truth[:, :start]], 1),
        )
        made += [chunk.latents.float() for chunk in chunks]
    return torch.cat(made, 1)


def tell(name: str, videos: Tensor | NDArray[Any], scenes: Sequence[SceneSpec], details: bool) -> dict[str, Any]:
    """Judges the videos of all scenes and prints the shares that are right, by shape, size, motion and count too."""
    found = [(v, len(scene.objects)) for video, scene in zip(videos, scenes) for v in judge(np.asarray(video), scene)]
    total = summarize(v for v, _ in found)
    print(
        f"{name:32}  " + "  ".join(f"{key} {total[key]:6.1%}" for key in ("color", "shape", "motion", "all")),
        flush=True,
    )
    result: dict[str, Any] = {"rung": name, **total}
    for kind in ("shape", "size", "motion", "objects") if details else ():
        groups: dict[str, list[Verdict]] = defaultdict(list)
        for v, count in found:
            groups[str(count) if kind == "objects" else getattr(v.spec, kind)].append(v)
        result[f"by_{kind}"] = {word: summarize(vs) for word, vs in sorted(groups.items())}
        for word, s in result[f"by_{kind}"].items():
            print(f"    {kind} {word:24}  " + "  ".join(f"{key} {s[key]:4.0%}" for key in ("color", "shape", "motion")))
    return result


def errors(latents: Tensor, truth: Tensor, objects: Tensor, chunk_frames: int) -> list[float]:
    """The mean square error of normalised latents where objects are, chunk by chunk."""
    error = (latents - truth).square().mean(2) * objects
    parts = zip(error.split(chunk_frames, 1), objects.split(chunk_frames, 1), strict=True)
    return [round(float(e.sum() / o.sum()), 3) for e, o in parts]


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--model", default="toybox", show_default=True, help="A name, a folder or a file.")
@click.option("--prompts", default=48, show_default=True, type=click.IntRange(1))
@click.option("--development", is_flag=True, help="Draw other prompts than those that goals are measured on.")
@click.option("--codec-only", is_flag=True, help="Leave the model out.")
@torch.inference_mode()
def main(model: str, prompts: int, development: bool, codec_only: bool) -> None:
    """Measures where a toybox model's objects are lost."""
    pipe = CausalVideoPipeline.from_pretrained(model)
    scenes, first = draw_scenes(prompts), 0
    if development:
        generator, first = torch.Generator().manual_seed(DEVELOPMENT_SEED), 1000
        scenes = [random_scene(generator) for _ in range(prompts)]
    starts = torch.stack([torch.rand(START_VARIABLES, generator=keyed_generator(first + n)) for n in range(prompts)])
    times = torch.arange(FRAMES)
    pixels = render(scenes, starts, times, pipe.height)
    truth = encoded(pipe, pixels)
    rungs = [tell("rendered truth", as_bytes(pixels.transpose(1, 2)), scenes, False)]
    rungs.append(tell("through the codec", decoded(pipe, truth), scenes, True))
    rungs += [tell(f"codec, latent noise {s}", decoded(pipe, truth, s), scenes, False) for s in (0.2, 0.45)]
    if not codec_only:
        behind = encoded(pipe, render([SceneSpec((), s.background) for s in scenes], starts, times, pipe.height))
        objects = (truth - behind).abs().mean(2) > VISIBLE
        embeds = torch.stack([encode_scene(scene, start) for scene, start in zip(scenes, starts, strict=True)])
        for name, history in (("after the truth's history", truth), ("after its own history", None)):
            latents = sampled(pipe, embeds, history)
            rungs.append(tell(f"{model}, {name}", decoded(pipe, latents), scenes, True))
            rungs[-1]["object_error_by_chunk"] = errors(latents, truth, objects, pipe.config.stream.chunk_frames)
            print(f"    error on objects by chunk: {rungs[-1]['object_error_by_chunk']}")
    print(json.dumps({"benchmark": "toybox_ladder", "model": model, "prompts": prompts, "rungs": rungs}))


if __name__ == "__main__":
    main()
