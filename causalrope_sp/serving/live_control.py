"""The control of live sessions: what a viewer has sent last holds for every chunk that is begun after it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from causalrope_sp.errors import ConfigError
from causalrope_sp.pipeline.image_control import takes_image

if TYPE_CHECKING:
    from causalrope_sp.grid import Chunk
    from causalrope_sp.pipeline.pipeline import CausalVideoPipeline


@dataclass(frozen=True)
class ControlSize:
    """The size of the control of one latent frame.

    Args:
        channels: of the control.
        height: of a latent frame.
        width: likewise.
    """

    channels: int
    height: int
    width: int

    @classmethod
    def of(cls, pipe: CausalVideoPipeline) -> ControlSize | None:
        """Returns what a pipeline takes of a viewer; None if its model takes no control, or makes it of an image.

        Raises:
            ConfigError: chunks are made ahead, so that nobody can say from which chunk on a control holds.
        """
        model, grid = pipe.model.config, pipe.settings().grid
        if not model.control_channels or takes_image(model, pipe.codec):
            return None
        if pipe.parts.options.decode == "overlap":
            raise ConfigError("decode must be inline or spatial to serve a model that takes a control, not overlap")
        return cls(model.control_channels, grid.rows * grid.patch[0], grid.columns * grid.patch[1])

    def check(self, values: Sequence[float]) -> None:
        """Raises ConfigError unless there are as many numbers as channels, or as numbers of a latent frame."""
        whole = self.channels * self.height * self.width
        if len(values) not in (self.channels, whole):
            raise ConfigError(
                f"control must be {self.channels} numbers, one a channel, or {whole} numbers of {self.channels} "
                f"channels, {self.height} rows and {self.width} columns, not {len(values)} numbers"
            )


class HeldControl:
    """The control of a session; a `Control`. It is zero until something else is held.

    Args:
        size: of a latent frame's.
        values: the first that are held; None for zero.
    """

    def __init__(self, size: ControlSize, values: Sequence[float] | None) -> None:
        self._size = size
        self.hold([0.0] * size.channels if values is None else values)

    def hold(self, values: Sequence[float]) -> None:
        """Holds other values from the next chunk on.

        Args:
            values: as `ControlSize.check` lets them pass.
        """
        uniform = len(values) == self._size.channels
        area = (1, 1) if uniform else (self._size.height, self._size.width)
        self._held = torch.tensor(values, dtype=torch.float32).view(1, 1, self._size.channels, *area)

    def __call__(self, chunk: Chunk) -> Tensor:
        """Returns the control of a chunk, (1, F, C, H, W) or (1, F, C, 1, 1): the same in all its latent frames."""
        return self._held.expand(-1, chunk.frames, -1, -1, -1)
