"""The options of `causalrope-sp generate`, and which of them go where."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from pathlib import Path
from typing import Any, get_args

import click

from causalrope_sp.cli.options import DTYPES, SEED, complete_model, complete_preset, complete_strategy
from causalrope_sp.config import Solver

EXISTING = click.Path(exists=True, path_type=Path)
EXISTING_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
# which options go where: to the ranks, to loading, to the call; by their Python names
RANKS = ("strategy", "cfg", "chunk", "decode_ranks", "overlap", "head_groups", "attention")
LOADING = (
    *("base", "preset", "revision", "dtype", "height", "width", "window", "sink", "chunk_frames", "rope"),
    *("num_inference_steps", "solver", "shift", "guidance_scale", "guidance_interval"),
    *("weights", "offload", "codec", "codec_weights", "decode", "preflight", "parallel_chunks"),
)
CALL = (
    *("num_frames", "seed", "negative_prompt", "negative_prompt_embeds", "image", "video", "strength", "reuse"),
    "preview_every",
)

OPTIONS = (
    click.option(
        "--model",
        default="toybox",
        show_default=True,
        shell_complete=complete_model,
        help="Run this model: a name, a diffusers folder, a checkpoint file, or org/name on the Hub.",
    ),
    click.option(
        "--base",
        help="Take text encoder and VAE from this folder or org/name, for a model that is a file alone.",
    ),
    click.option(
        "--preset",
        shell_complete=complete_preset,
        help="Run the model as this published one: self-forcing, causvid, ... The default is inferred from its files.",
    ),
    click.option(
        "--revision",
        help="Take this branch, tag or commit from the Hub. The default is the main branch.",
    ),
    click.option(
        "--text-embeds",
        metavar="FILE",
        help="Take embeddings that encode wrote in place of PROMPT.",
    ),
    click.option(
        "--frames",
        "num_frames",
        type=int,
        default=81,
        show_default=True,
        help="Make so many pixel frames.",
    ),
    click.option(
        "--height",
        type=int,
        help="Make frames of so many pixels in height. The default is the model's.",
    ),
    click.option(
        "--width",
        type=int,
        help="Make frames of so many pixels in width. The default is the model's.",
    ),
    click.option(
        "--seed",
        type=SEED,
        default=0,
        show_default=True,
        help="Draw all noise from this seed.",
    ),
    click.option(
        "--window",
        type=int,
        help="Let attention look back over so many latent frames, the current chunk counted.",
    ),
    click.option(
        "--sink",
        type=int,
        help="Keep so many latent frames of the very start in the window for ever.",
    ),
    click.option(
        "--chunk-frames",
        type=int,
        help="Denoise so many latent frames together.",
    ),
    click.option(
        "--rope",
        type=click.Choice(["absolute", "relative"]),
        help="Rotate a frame by its number since the stream began, or by its place in the window.",
    ),
    click.option(
        "--steps",
        help="Take so many evenly spaced denoising steps (4), or these (1000,750,500,250).",
    ),
    click.option(
        "--solver",
        type=click.Choice(get_args(Solver)),
        help="Go from step to step by this solver.",
    ),
    click.option(
        "--shift",
        type=float,
        help="Shift the timesteps towards noise.",
    ),
    click.option(
        "--guidance",
        "guidance_scale",
        type=float,
        help="Guide by this scale away from a negative prompt; 1 is none.",
    ),
    click.option(
        "--guidance-interval",
        type=(float, float),
        help="Guide only the steps at timesteps between these two, 0 to 1000.",
    ),
    click.option(
        "--negative-prompt",
        help="Guide away from this text. The default is no text.",
    ),
    click.option(
        "--negative-embeds",
        "negative_prompt_embeds",
        metavar="FILE",
        help="Take embeddings that encode wrote in its place.",
    ),
    click.option(
        "--guidance-parallel",
        is_flag=True,
        help="Give each of guidance's two branches one half of the ranks.",
    ),
    click.option(
        "--strategy",
        default="auto",
        show_default=True,
        shell_complete=complete_strategy,
        help="Share attention by this strategy: auto, ulysses, gather-kv, shard-kv, ulysses2xgather-kv4, ...",
    ),
    click.option(
        "--parallel-chunks",
        type=click.Choice(["vin"]),
        help="Denoise all chunks at once, by the model's interface network.",
    ),
    click.option(
        "--chunk-parallel",
        "chunk",
        type=int,
        help="With it, share the chunks among so many groups of ranks. The default is all.",
    ),
    click.option(
        "--preview-every",
        type=int,
        help="With it, write what the video looks to become every so many steps.",
    ),
    click.option(
        "--image",
        type=EXISTING_FILE,
        help="Take this picture as the first frame.",
    ),
    click.option(
        "--video",
        type=EXISTING_FILE,
        help="Take this video, to continue it or to redraw it.",
    ),
    click.option(
        "--continue",
        "keep_on",
        is_flag=True,
        help="Make what comes after --video.",
    ),
    click.option(
        "--strength",
        type=float,
        help="Redraw --video by this share of the steps: above 0, which changes least, to 1.",
    ),
    click.option(
        "--reuse",
        help="Reuse attention outputs between steps by this policy: pab:latte, ..., or a JSON file.",
    ),
    click.option(
        "--codec",
        type=click.Choice(["wan", "taehv"]),
        help="Insist on this kind of codec. The default is what the file holds.",
    ),
    click.option(
        "--codec-weights",
        type=EXISTING,
        help="Take the codec from this file or folder, in place of the model's.",
    ),
    click.option(
        "--decode",
        type=click.Choice(["inline", "overlap", "spatial"]),
        default="inline",
        show_default=True,
        help="Decode on rank 0 before the next chunk is made, on rank 0 meanwhile, or on all ranks, a part each.",
    ),
    click.option(
        "--decode-ranks",
        type=click.IntRange(0),
        default=0,
        show_default=True,
        help="Let so many of the ranks only decode, while the others make the next chunk.",
    ),
    click.option(
        "--weights",
        type=click.Choice(["full", "fp8"]),
        help="Keep the blocks' matrices in full, or in 8 bits.",
    ),
    click.option(
        "--dtype",
        type=click.Choice(DTYPES),
        help="Run the transformer in this dtype. The default is by device.",
    ),
    click.option(
        "--device",
        help="Run on this device, such as cpu or cuda:1. The default is a GPU if there is one.",
    ),
    click.option(
        "--offload",
        multiple=True,
        default=["text"],
        show_default=True,
        metavar="text|codec|none",
        help="Keep this on the device only while it is used.",
    ),
    click.option(
        "--preflight/--no-preflight",
        default=True,
        help="Refuse at once what is predicted not to fit into memory.",
    ),
    click.option(
        "--out",
        default="video.mp4",
        show_default=True,
        help="Write FILE.mp4, .mov, .webm, .gif or .webp, FOLDER/ for PNGs, or - for MP4 on the standard output.",
    ),
    click.option(
        "--overlap/--no-overlap",
        default=True,
        help="Compute while other ranks' numbers are in flight.",
    ),
    click.option(
        "--head-groups",
        default=1,
        show_default=True,
        help="With ulysses, send one group of heads while the next is computed.",
    ),
    click.option(
        "--attention",
        default="auto",
        show_default=True,
        help="Attend with this library; auto measures them.",
    ),
    click.option(
        "--timeout",
        default=600.0,
        show_default=True,
        help="End a run after a rank was stuck for so many seconds (silent: 20).",
    ),
    click.option(
        "--json",
        "as_json",
        is_flag=True,
        help="Show no progress bar, and print one line of JSON at the end.",
    ),
    click.option(
        "-v",
        "--verbose",
        is_flag=True,
        help="Say on the standard error what is chosen and how long it takes.",
    ),
    click.option(
        "--log-file",
        metavar="FILE",
        help="Append what -v says, of all ranks, to this file.",
    ),
)


def with_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The command with all of them, in this order."""
    return reduce(lambda made, option: option(made), reversed(OPTIONS), command)
