"""The commands for models that make a whole video at once (Latte, Open-Sora): their options and their reports."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from causalrope_sp.errors import ConfigError
from causalrope_sp.spatiotemporal.kinds import NAMES, Kind

if TYPE_CHECKING:
    from causalrope_sp.distributed import SequenceParallel
    from causalrope_sp.planning.machines import Machine
    from causalrope_sp.reuse import ReusePolicy

# parameters of commands that such models take; the others say how a stream is made, which they do not
TAKEN = frozenset(
    {
        *("prompt", "model", "num_frames", "height", "width", "seed", "steps", "guidance_scale", "negative_prompt"),
        *("guidance_parallel", "reuse", "dtype", "device", "attention", "out", "timeout", "as_json", "verbose"),
        *("log_file", "path", "prompts", "frames", "bound", "max_range", "ranks", "gpu", "link", "measured"),
    }
)
LOADING = ("height", "width", "num_inference_steps", "guidance_scale", "dtype")  # fields of `VideoOptions`
CALL = ("num_frames", "seed", "negative_prompt", "reuse")  # arguments of `WholeVideoPipeline.stream`


def check_whole_video(kind: Kind, options: dict[str, Any], frames: str = "num_frames") -> None:
    """Checks that the command was given no option of a stream, and completes the options: without --frames the model
    decides.

    Args:
        kind: the kind of model.
        options: the options of the command.
        frames: the name of the option --frames in it.

    Raises:
        ConfigError: an option is one of a stream.
    """
    context = click.get_current_context()
    for parameter in context.command.params:
        name = parameter.name or ""
        if name not in TAKEN and context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            raise ConfigError(f"{NAMES[kind]} makes its video at once: it has no {parameter.opts[0]} to set")
    if context.get_parameter_source(frames) is ParameterSource.DEFAULT:
        options[frames] = None


def whole_video_items(
    model: str, prompt: str | None, options: dict[str, Any], parallel: SequenceParallel
) -> Iterator[Any]:
    """Opens a model and makes a video, as `generate` writes it.

    Args:
        model: the folder.
        prompt: what the video shows.
        options: the checked options of the command.
        parallel: the ranks.

    Yields:
        The pipeline, then the chunks of its video.
    """
    from causalrope_sp.spatiotemporal.opening import open_video_pipeline
    from causalrope_sp.spatiotemporal.video_pipeline import VideoOptions

    pipe = open_video_pipeline(model, VideoOptions(**{name: options[name] for name in LOADING}), parallel)
    yield pipe
    assert prompt is not None, "generate has checked it"
    yield from pipe.stream(prompt, **{name: options[name] for name in CALL})


def plan_whole_video(
    model: str, reuse: ReusePolicy | None, ranks: int, on: Machine, as_json: bool, options: dict[str, Any]
) -> str:
    """Plans the model's own video on so many ranks.

    Args:
        model: the folder.
        reuse: the reuse policy, or None.
        ranks: how many ranks there are.
        on: the machine.
        as_json: whether the text is a JSON object.
        options: the options of the command.

    Returns:
        The text to print.
    """
    from causalrope_sp.distributed.mesh import possible_cfg_sizes
    from causalrope_sp.spatiotemporal.cost import saved, video_cost
    from causalrope_sp.spatiotemporal.opening import plan_video_pipeline, video_work
    from causalrope_sp.spatiotemporal.video_pipeline import VideoOptions

    names = {"height": "height", "width": "width", "num_inference_steps": "steps", "guidance_scale": "guidance_scale"}
    pipe = plan_video_pipeline(model, VideoOptions(**{name: options[given] for name, given in names.items()}))
    work = video_work(pipe, reuse)
    cfg_sizes = [size for size in possible_cfg_sizes(work.batch > 1, ranks) if ranks // size <= work.tokens]
    if not cfg_sizes:
        raise ConfigError(f"ranks: expected at most the {work.tokens} tokens of a frame, got {ranks}")
    costs = [video_cost(work, ranks, cfg, on) for cfg in cfg_sizes]
    shares = [saved(video_cost(replace(work, reuse=None), ranks, cost.cfg, on), cost) for cost in costs]
    if as_json:
        found = [asdict(cost) | {"strategy": cost.name, "video_s": cost.video_s} for cost in costs]
        saving = [{"saved_flops": share["flops"], "saved_bytes": share["bytes"]} for share in shares]
        return json.dumps({"strategies": [each | more for each, more in zip(found, saving, strict=True)]})
    lines = [
        f"{work.layers} layers of {work.dim}, {work.frames} latent frames of {work.tokens} tokens, "
        f"{len(work.timesteps)} steps{', guided' if work.batch > 1 else ''}; {ranks} ranks, {on.name}",
        f"{'strategy':>10} {'TFLOP':>9} {'calls':>7} {'GB moved':>9} {'GB kept':>8} {'comp. s':>8} {'video s':>8}",
    ]
    for cost in costs:
        numbers = (cost.flops / 1e12, cost.collectives, cost.bytes / 1e9, cost.stored_bytes / 1e9)
        times = f"{cost.compute_s:8.3g} {cost.video_s:8.3g}"
        lines.append(f"{cost.name:>10} {numbers[0]:9.4g} {numbers[1]:7} {numbers[2]:9.4g} {numbers[3]:8.3g} {times}")
    weights = f"{costs[0].weights_bytes / 1e9:.3g} GB of weights"
    lines.append(f"Predicted, not measured, for the rank with the most of each; {weights}.")
    if reuse is not None:
        lines.append(
            f"Reuse saves {shares[0]['flops']:.1%} of the FLOPs and {shares[0]['bytes']:.1%} of the bytes moved."
        )
    return "\n".join(lines)


def inspect_whole_video(folder: str, kind: Kind) -> dict[str, Any]:
    """Describes a folder; its transformer is loaded, so that a fault in it is found.

    Args:
        folder: the folder.
        kind: the kind of model.

    Returns:
        Values that JSON can represent.
    """
    from causalrope_sp.spatiotemporal.opening import open_video_pipeline
    from causalrope_sp.spatiotemporal.video_pipeline import VideoOptions

    pipe = open_video_pipeline(folder, VideoOptions(dtype="float32"))
    parts = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")
    return {
        "path": folder,
        "model": NAMES[kind],
        "parts": [part for part in parts if (Path(folder) / part).is_dir()],
        "config": asdict(pipe.model.config),
        "parameters": sum(parameter.numel() for parameter in pipe.model.parameters()),
        "reused": list(pipe.model.kinds),
        "settings": asdict(pipe.settings),
    }
