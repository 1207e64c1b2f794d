"""`generate --parallel-chunks`: its options, and what it shows while nothing is ready."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from causalrope_sp.errors import ConfigError
from causalrope_sp.process import rank
from causalrope_sp.video import VideoWriter

if TYPE_CHECKING:
    from causalrope_sp.vin.video import Glimpse


def check_together(together: bool, lanes: int | None, preview_every: int | None) -> None:
    """Raises ConfigError for an option that only chunks made in parallel have, or a number below 1."""
    for name, value in (("--lanes", lanes), ("--preview-every", preview_every)):
        if value is not None and not together:
            raise ConfigError(f"{name} is for chunks made in parallel: say --parallel-chunks vin")
        if value is not None and value < 1:
            raise ConfigError(f"{name} must be at least 1, not {value}")


class Watching:
    """Says on stderr which step is done, and writes previews beside the video: clip.mp4, clip.step8.mp4."""

    def __init__(self, out: str, fps: float, silent: bool) -> None:
        self._out, self._fps, self._silent = out, fps, silent

    def __call__(self, glimpse: Glimpse) -> None:
        if rank() == 0 and not self._silent:
            click.echo(f"step {glimpse.step} of {glimpse.steps}", err=True)
        if glimpse.frames is not None:
            _, height, width, _ = glimpse.frames.shape
            with VideoWriter(self._beside(glimpse.step), height, width, self._fps) as video:
                video.write(glimpse.frames)

    def _beside(self, step: int) -> str:
        """The preview's path: in a folder of its own where the video is a folder of pictures."""
        path = Path(self._out)
        return str(path.with_name(f"{path.stem}.step{step}{path.suffix}")) + ("/" if self._out.endswith("/") else "")
