"""Options on a model's run that several commands take."""

from __future__ import annotations

from typing import TYPE_CHECKING, get_args

import click

from causalrope_sp.cli.numbers import FLOAT, INTEGER
from causalrope_sp.config import CacheDtype, WindowPolicy
from causalrope_sp.errors import ConfigError

if TYPE_CHECKING:
    from causalrope_sp.pipeline.pipeline import CausalVideoPipeline

HEIGHT = click.option("--height", type=INTEGER, help="Set the height of a frame in pixels. The default is the model's.")
WIDTH = click.option("--width", type=INTEGER, help="Set the width of a frame in pixels. The default is the model's.")
WINDOW = click.option(
    "--window",
    type=INTEGER,
    help="Let attention look back over this many latent frames, current chunk counted. The default is the model's.",
)
SINK = click.option(
    "--sink", type=INTEGER, help="Keep this many of the first latent frames in the window. The default is the model's."
)
WINDOW_POLICY = click.option(
    "--window-policy",
    type=click.Choice(get_args(WindowPolicy)),
    help="Slide the window, begin a sink at each prompt, or compute the window anew. The default is the model's.",
)
SIMILAR_FRAMES = click.option(
    "--similar-frames",
    type=FLOAT,
    metavar="NUMBER|SHARE",
    help="Attend, besides the sink and the newest frames, only this many frames, by similarity, or leave out "
    "this share of all frames. The default is all of the window.",
)
CACHE = click.option(
    "--cache",
    type=click.Choice(get_args(CacheDtype)),
    help="Store keys and values in the model's dtype or, with a loss, in 8 bits. The default is the model's.",
)
HEADS = click.option(
    "--heads",
    metavar="FILE",
    help="Let each attention head see the frames, and rows of them, that this file says. The default is all of them.",
)
CHUNK_FRAMES = click.option(
    "--chunk-frames", type=INTEGER, help="Put this many latent frames into a chunk. The default is the model's."
)
SHIFT = click.option(
    "--shift", type=FLOAT, help="Shift the timesteps towards noise by this factor. The default is the model's."
)
GUIDANCE_INTERVAL = click.option(
    "--guidance-interval",
    type=(FLOAT, FLOAT),
    help="Guide only the steps between these timesteps, 0 to 1000. The default is the model's.",
)
OFFLOAD = click.option(
    "--offload",
    multiple=True,
    default=["text"],
    show_default=True,
    metavar="text|codec|none",
    help="Keep these weights on the device only while they are used.",
)


def check_uncontrolled(model: str, pipe: CausalVideoPipeline) -> None:
    """Raises ConfigError if a model that was loaded takes a control, which no command line gives."""
    if channels := pipe.model.config.control_channels:
        raise ConfigError(
            f"--model: expected a model without a control, got {model}, which takes {channels} channels of it for each "
            "latent frame: run it in Python (`control=` of `pipe.stream`) or by `serve`"
        )
