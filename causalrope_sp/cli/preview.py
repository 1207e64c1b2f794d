"""`generate --parallel-chunks`: its options, and what it shows while nothing is ready."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from causalrope_sp.cli.runtime import rank, ranks, shares_rank_0_disk
from causalrope_sp.errors import ConfigError, OutputError
from causalrope_sp.io.video_writer import VideoWriter, check_output, is_folder


def check_parallel_chunks(
    parallel_chunks: bool, out: str, chunk: int | None, preview_every: int | None, **others: object
) -> None:
    """Refuses what does not go with chunks made in parallel, or goes with nothing else.

    Args:
        parallel_chunks: whether chunks are made in parallel.
        out: where the video goes.
        chunk: --chunk-parallel.
        preview_every: --preview-every.
        others: options that chunks made in parallel have not.

    Raises:
        ConfigError: an option that only chunks made in parallel have, or one of the `others`; a number below 1, or of
            groups that does not divide the ranks.
        OutputError: a preview that cannot be written.
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
            raise ConfigError("--preview-every writes files beside the video: --out must be a file, not -")
        if shares_rank_0_disk():
            check_output(preview_path(out, preview_every))


class StepReporter:
    """A `callback_on_step_end` that says on stderr which step is done, and writes previews beside the video: clip.mp4,
    clip.step8.mp4.

    A preview that cannot be written is a warning: the video goes on.
    """

    def __init__(self, out: str, fps: float, silent: bool) -> None:
        self._out, self._fps, self._silent = out, fps, silent

    def __call__(self, pipe: Any, step: int, timestep: float, told: dict[str, Any]) -> None:
        if rank() != 0:
            return
        if not self._silent:
            click.echo(f"step {step + 1} of {told['num_steps']}", err=True)
        preview = told["preview"]
        if preview is None:
            return
        _, height, width, _ = preview.frames.shape
        try:
            with VideoWriter(preview_path(self._out, preview.step), height, width, self._fps) as video:
                video.write(preview.frames)
        except OutputError as reason:
            click.echo(f"warning: no preview of step {preview.step}: {reason}", err=True)


def preview_path(out: str, step: int) -> str:
    """A preview's path: in a folder of its own where the video is a folder of pictures."""
    path = Path(os.path.abspath(out))
    return str(path.with_name(f"{path.stem}.step{step}{path.suffix}")) + ("/" if is_folder(out) else "")
