"""`generate --parallel-chunks`: checks of its options, and reports of its steps."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from causalrope_sp.cli.runtime import rank, ranks, shares_rank_0_disk
from causalrope_sp.errors import ConfigError, OutputError, escaped_line
from causalrope_sp.io.video_writer import VideoWriter, check_output, is_folder


def check_parallel_chunks(
    parallel_chunks: bool, out: str, chunk: int | None, preview_every: int | None, **others: object
) -> None:
    """Checks that the options agree on parallel chunks.

    Args:
        parallel_chunks: whether chunks are made in parallel.
        out: the path of the video.
        chunk: the value of --chunk-parallel.
        preview_every: the value of --preview-every.
        others: options that parallel chunks do not support, by name.

    Raises:
        ConfigError: an option does not fit, a number is below 1, or `chunk` does not divide the number of ranks.
        OutputError: previews cannot be written.
    """
    for name, value in others.items():
        if parallel_chunks and value:
            raise ConfigError(f"chunks made in parallel have no --{name.replace('_', '-')} to set")
    for name, value in (("--chunk-parallel", chunk), ("--preview-every", preview_every)):
        if value is not None and not parallel_chunks:
            raise ConfigError(f"{name} is for chunks made in parallel: say --parallel-chunks vin")
        if value is not None and value < 1:
            raise ConfigError(f"{name} must be at least 1, not {value}")
    if chunk is not None and ranks() % chunk:
        raise ConfigError(f"--chunk-parallel must be a divisor of the {ranks()} ranks, not {chunk}")
    if preview_every is not None:
        if out == "-":
            raise ConfigError("--preview-every writes files next to the video: --out must be a file, not -")
        if shares_rank_0_disk():
            check_output(preview_path(out, preview_every))


class StepReporter:
    """A `callback_on_step_end` that reports finished steps on stderr and writes previews next to the video.

    The preview of clip.mp4 after step 8 is clip.step8.mp4. If a preview cannot be written, a warning is printed and
    the video goes on.

    Args:
        out: the path of the video.
        fps: pixel frames per second of the previews.
        silent: whether steps are not reported.
    """

    def __init__(self, out: str, fps: float, silent: bool) -> None:
        self._out, self._fps, self._silent = out, fps, silent

    def __call__(self, pipe: Any, step: int, timestep: float, kwargs: dict[str, Any]) -> None:
        if rank() != 0:
            return
        if not self._silent:
            click.echo(f"step {step + 1} of {kwargs['num_steps']}", err=True)
        preview = kwargs["preview"]
        if preview is None:
            return
        _, height, width, _ = preview.frames.shape
        try:
            with VideoWriter(preview_path(self._out, preview.step), height, width, self._fps) as video:
                video.write(preview.frames)
        except OutputError as reason:
            click.echo(escaped_line(f"warning: no preview of step {preview.step}: {reason}"), err=True)


def preview_path(out: str, step: int) -> str:
    """Returns the path of a preview, which is a folder if the video is a folder of PNGs.

    Args:
        out: the path of the video.
        step: the number of the step.
    """
    path = Path(os.path.abspath(out))
    return str(path.with_name(f"{path.stem}.step{step}{path.suffix}")) + ("/" if is_folder(out) else "")
