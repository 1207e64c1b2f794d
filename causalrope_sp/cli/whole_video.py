"""`generate` for models that make a whole video at once (Latte, Open-Sora): which options they take."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from causalrope_sp.errors import ConfigError
from causalrope_sp.spatiotemporal.folder import NAMES, Kind

if TYPE_CHECKING:
    from causalrope_sp.distributed import SequenceParallel

# parameters of `generate` that such models take; the others say how a stream is made, which they do not
TAKEN = frozenset(
    {
        *("prompt", "model", "num_frames", "height", "width", "seed", "steps", "guidance_scale", "negative_prompt"),
        *("guidance_parallel", "reuse", "dtype", "device", "attention", "out", "timeout", "as_json", "verbose"),
        "log_file",
    }
)
LOADING = ("height", "width", "num_inference_steps", "guidance_scale", "dtype")  # fields of `VideoOptions`
CALL = ("num_frames", "seed", "negative_prompt", "reuse")  # arguments of `WholeVideoPipeline.stream`


def check_whole_video(kind: Kind, options: dict[str, Any]) -> None:
    """Checks that the command was given no option of a stream, and completes the options: without --frames the model
    decides.

    Args:
        kind: the kind of model.
        options: the options of the command.

    Raises:
        ConfigError: an option is one of a stream.
    """
    context = click.get_current_context()
    for parameter in context.command.params:
        name = parameter.name or ""
        if name not in TAKEN and context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            raise ConfigError(f"{NAMES[kind]} makes its video at once: it has no {parameter.opts[0]} to set")
    if context.get_parameter_source("num_frames") is ParameterSource.DEFAULT:
        options["num_frames"] = None


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
