"""A picture cut into strips, one a rank, along its longer axis: what convolutions and attention need of the others.

Strips differ by at most one latent row or column, and scale with the picture from layer to layer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from causalrope_sp.distributed.comm_stats import LAYERLESS
from causalrope_sp.distributed.communicator import Exchange
from causalrope_sp.errors import ConfigError
from causalrope_sp.grid import shares


class Strips:
    """The strips of a latent of height×width. `axis` is the one that is cut, -1 width or -2 height.

    Raises:
        ConfigError: more ranks than the longer side has latent pixels.
    """

    def __init__(self, exchange: Exchange, height: int, width: int) -> None:
        self._exchange = exchange
        self.axis = -1 if width >= height else -2
        self.sizes = shares(max(height, width), exchange.size)
        if 0 in self.sizes:
            raise ConfigError(
                f"{exchange.size} ranks that decode are more than the {max(height, width)} latent "
                f"{'columns' if self.axis == -1 else 'rows'} of a picture"
            )

    def mine(self, x: Tensor) -> Tensor:
        """This rank's strip of a whole latent."""
        rank = self._exchange.rank
        return x.narrow(self.axis, sum(self.sizes[:rank]), self.sizes[rank])

    def widened(self, strip: Tensor, reach: int) -> Tensor:
        """The strip with `reach` rows or columns of its neighbours on either side; zeros beyond the picture's edges."""
        rank, last = self._exchange.rank, self._exchange.size - 1
        edge = list(strip.shape)
        edge[self.axis] = reach
        beyond = {other: edge for other in (rank - 1, rank + 1) if 0 <= other <= last}
        shapes: list[Sequence[int]] = [beyond.get(other, (0,)) for other in range(last + 1)]
        sent = self._exchange.buffer("halo out", shapes, strip)
        if rank > 0:
            sent[rank - 1].copy_(strip.narrow(self.axis, 0, reach))
        if rank < last:
            sent[rank + 1].copy_(strip.narrow(self.axis, strip.shape[self.axis] - reach, reach))
        arrived = self._exchange.all_to_all("halo", LAYERLESS, shapes, sent).wait()
        nothing = strip.new_zeros(edge)
        before, after = (arrived[r] if r in beyond else nothing for r in (rank - 1, rank + 1))
        return torch.cat([before, strip, after], self.axis)

    def whole(self, strip: Tensor) -> Tensor:
        """All strips side by side, on every rank."""
        shapes = self._shapes(strip)
        block = max(torch.Size(shape).numel() for shape in shapes)
        (sent,) = self._exchange.buffer("mid out", [strip.shape], strip, block=block)
        sent.copy_(strip)
        return torch.cat(self._exchange.all_gather("mid", LAYERLESS, shapes, sent).wait(), self.axis)

    def on_first(self, strip: Tensor) -> Tensor | None:
        """All strips side by side on the first rank; None on the others."""
        arrived = self._exchange.gather_to_first("pixels", self._shapes(strip), strip)
        return torch.cat(arrived, self.axis) if self._exchange.rank == 0 else None

    def _shapes(self, strip: Tensor) -> list[list[int]]:
        """The shape of every rank's strip at the scale of this rank's."""
        scale = strip.shape[self.axis] // self.sizes[self._exchange.rank]
        shapes = []
        for size in self.sizes:
            shape = list(strip.shape)
            shape[self.axis] = size * scale
            shapes.append(shape)
        return shapes
