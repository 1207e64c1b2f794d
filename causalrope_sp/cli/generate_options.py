"""The options of `causalrope-sp generate`, sorted by the Python call that takes them."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from pathlib import Path
from typing import Any, get_args

import click

from causalrope_sp.cli.model_options import (
    CACHE,
    CHUNK_FRAMES,
    GUIDANCE_INTERVAL,
    HEADS,
    HEIGHT,
    OFFLOAD,
    SHIFT,
    SIMILAR_FRAMES,
    SINK,
    WIDTH,
    WINDOW,
    WINDOW_POLICY,
)
from causalrope_sp.cli.numbers import FLOAT, INTEGER, SEED, IntRange
from causalrope_sp.cli.options import complete_model, complete_preset, complete_strategy
from causalrope_sp.config import DTYPE_NAMES, Solver, TimestepRule

EXISTING = click.Path(exists=True, path_type=Path)
EXISTING_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
# Python names of the options of SequenceParallel.from_env, LoadOptions and GenerationOptions
RANKS = ("strategy", "cfg", "chunk", "decode_ranks", "overlap", "head_groups", "attention")
LOADING = (
    *("loras", "base", "preset", "revision", "dtype", "height", "width"),
    *("window", "sink", "chunk_frames", "window_policy", "similar_frames", "cache", "heads", "rope"),
    *("num_inference_steps", "solver", "timestep_rule", "shift", "guidance_scale", "guidance_interval"),
    *("weights", "offload", "codec", "codec_weights", "decode", "preflight", "graphs", "parallel_chunks"),
)
SOURCES = ("image", "video", "strength")
CALL = ("num_frames", "seed", "negative_prompt", "negative_prompt_embeds", *SOURCES, "reuse", "preview_every")

OPTIONS = (
    click.option(
        "--model",
        default="toybox",
        show_default=True,
        shell_complete=complete_model,
        help="Run this model: a name, a folder, a pipeline.json, org/name on the Hub, or a file with --base.",
    ),
    click.option(
        "--base",
        help="Load text encoder and VAE from this folder or org/name. The default is the model's own folder.",
    ),
    click.option(
        "--preset",
        shell_complete=complete_preset,
        help="Use the settings of this published model: self-forcing, causvid, ... The default is inferred.",
    ),
    click.option(
        "--lora",
        "loras",
        multiple=True,
        metavar="FILE[:WEIGHT][:no-image][:high-noise|:low-noise]",
        help="Merge this LoRA into the transformer, times WEIGHT (1); with :no-image, leave out what only models that "
        "read an image have. Of two transformers, the name of the file says which, or :high-noise or :low-noise. "
        "Several can be given. The default is none.",
    ),
    click.option("--revision", help="Load this branch, tag or commit from the Hub. The default is the main branch."),
    click.option(
        "--text-embeds",
        metavar="FILE",
        help="Use embeddings that the command encode wrote. The default is to encode PROMPT.",
    ),
    click.option(
        "--frames",
        "num_frames",
        type=INTEGER,
        default=81,
        show_default=True,
        help="Generate this many pixel frames.",
    ),
    click.option(
        "--endless",
        is_flag=True,
        help="Generate until Ctrl-C, which needs a window. The default is to stop after --frames.",
    ),
    HEIGHT,
    WIDTH,
    click.option(
        "--seed",
        type=SEED,
        default=0,
        show_default=True,
        help="Draw all noise from this seed.",
    ),
    WINDOW,
    SINK,
    CHUNK_FRAMES,
    WINDOW_POLICY,
    SIMILAR_FRAMES,
    CACHE,
    HEADS,
    click.option(
        "--rope",
        type=click.Choice(["absolute", "relative"]),
        help="Rotate by global time index, or by position in the window. The default is the model's.",
    ),
    click.option(
        "--steps",
        help="Use this many evenly spaced steps (4), or these timesteps (1000,750,...). The default is the model's.",
    ),
    click.option(
        "--solver",
        type=click.Choice(get_args(Solver)),
        help="Integrate from step to step with this solver. The default is the model's.",
    ),
    click.option(
        "--timestep-rule",
        type=click.Choice(get_args(TimestepRule)),
        help="Space the steps of --solver unipc as Wan's own code or as diffusers does. The default is the model's.",
    ),
    SHIFT,
    click.option(
        "--guidance",
        "guidance_scale",
        type=FLOAT,
        help="Set the scale of guidance; 1 is no guidance. The default is the model's.",
    ),
    GUIDANCE_INTERVAL,
    click.option(
        "--negative-prompt",
        help="Guide away from this text. The default is no text.",
    ),
    click.option(
        "--negative-embeds",
        "negative_prompt_embeds",
        metavar="FILE",
        help="Use embeddings that encode wrote as the negative prompt. The default is --negative-prompt.",
    ),
    click.option(
        "--guidance-parallel",
        is_flag=True,
        help="Run conditional and unconditional passes on one half of the ranks each. The default is off.",
    ),
    click.option(
        "--strategy",
        default="auto",
        show_default=True,
        shell_complete=complete_strategy,
        help="Share attention between ranks by this strategy: auto, ulysses, gather-kv, shard-kv, or a product of two.",
    ),
    click.option(
        "--parallel-chunks",
        type=click.Choice(["vin"]),
        help="Denoise all chunks at the same time with the model's interface network. The default is a stream.",
    ),
    click.option(
        "--chunk-parallel",
        "chunk",
        type=INTEGER,
        help="Share parallel chunks among this many groups of ranks. The default is one group a rank.",
    ),
    click.option(
        "--preview-every",
        type=INTEGER,
        help="Write a preview of parallel chunks each time this many steps are done. The default is no preview.",
    ),
    click.option(
        "--image",
        type=EXISTING_FILE,
        help="Use this image as the first frame. The default is to start from noise.",
    ),
    click.option(
        "--video",
        type=EXISTING_FILE,
        help="Use this video, with --continue or --strength. The default is to start from noise.",
    ),
    click.option(
        "--continue",
        "keep_on",
        is_flag=True,
        help="Generate the frames that follow --video. The default is off.",
    ),
    click.option(
        "--strength",
        type=FLOAT,
        help="Redraw --video with this share of the steps, above 0 and at most 1. The default is no redrawing.",
    ),
    click.option(
        "--reuse",
        help="Reuse attention outputs between steps by this policy: pab:latte, ... or a JSON file. The default is off.",
    ),
    click.option(
        "--codec",
        type=click.Choice(["wan", "taehv"]),
        help="Require this kind of codec. The default is the kind that the file holds.",
    ),
    click.option(
        "--codec-weights",
        type=EXISTING,
        help="Load the codec from this file or folder. The default is the model's.",
    ),
    click.option(
        "--decode",
        type=click.Choice(["inline", "overlap", "spatial"]),
        default="inline",
        show_default=True,
        help="Decode a chunk on rank 0 before the next one (inline) or during it (overlap), or on all ranks (spatial).",
    ),
    click.option(
        "--decode-ranks",
        type=IntRange(0),
        default=0,
        show_default=True,
        help="Let this many of the ranks only decode while the others denoise the next chunk.",
    ),
    click.option(
        "--weights",
        type=click.Choice(["full", "fp8", "fp8-dynamic"]),
        help="Keep the blocks' matrices in full precision or in 8 bits, or compute their products in 8 bits as well. "
        "The default is the model's.",
    ),
    click.option(
        "--dtype",
        type=click.Choice(DTYPE_NAMES),
        help="Run the transformer in this dtype. The default is bfloat16 on a GPU and float32 on a CPU.",
    ),
    click.option(
        "--device",
        help="Run on this device, such as cpu or cuda:1. The default is a GPU if there is one.",
    ),
    OFFLOAD,
    click.option(
        "--preflight/--no-preflight",
        default=True,
        show_default=True,
        help="Refuse, before loading, a run that is predicted not to fit into memory.",
    ),
    click.option(
        "--graphs/--no-graphs",
        default=True,
        show_default=True,
        help="Run the passes of a stream on GPUs by CUDA graphs once its window slides.",
    ),
    click.option(
        "--out",
        default="video.mp4",
        show_default=True,
        help="Write FILE.mp4, .mov, .webm, .gif or .webp, FOLDER/ for PNGs, or - for MP4 on stdout.",
    ),
    click.option(
        "--overlap/--no-overlap",
        default=True,
        show_default=True,
        help="Overlap computation with communication between ranks.",
    ),
    click.option(
        "--head-groups",
        type=INTEGER,
        default=1,
        show_default=True,
        help="Divide ulysses' heads into this many groups, at most a rank's heads; send one while computing the next.",
    ),
    click.option(
        "--attention",
        default="auto",
        show_default=True,
        help="Compute attention with this library; auto measures which is fastest.",
    ),
    click.option(
        "--timeout",
        type=FLOAT,
        default=600.0,
        show_default=True,
        help="End the run when a rank has been stuck for this many seconds (20 if it is silent).",
    ),
    click.option(
        "--json",
        "as_json",
        is_flag=True,
        help="Print one line of JSON at the end in place of a progress bar. The default is a progress bar.",
    ),
    click.option(
        "-v",
        "--verbose",
        is_flag=True,
        help="Log choices and times to stderr. The default is to log choices alone.",
    ),
    click.option(
        "--log-file",
        metavar="FILE",
        help="Append the log of all ranks with the detail of -v to this file. The default is no file.",
    ),
)


def with_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates a click command with all `OPTIONS`, in their order."""
    return reduce(lambda made, option: option(made), reversed(OPTIONS), command)
