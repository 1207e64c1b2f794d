"""A picture cut into strips, one a rank, along its longer axis: what convolutions and attention need of the others.

Strips differ by at most one latent row or column, and scale with the picture from layer to layer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from causalrope_sp.distributed.comm_stats import LAYERLESS
from causalrope_sp.distributed.communicator import Communicator
from causalrope_sp.errors import ConfigError
from causalrope_sp.grid import shares


class SpatialShards:
    """The strips of a latent of height×width. `axis` is the one that is cut, -1 width or -2 height.

    Raises:
        ConfigError: more ranks than the longer side has latent pixels.
    """

    def __init__(self, communicator: Communicator, height: int, width: int) -> None:
        self._communicator = communicator
        self.axis = -1 if width >= height else -2
        self.sizes = shares(max(height, width), communicator.size)
        if 0 in self.sizes:
            raise ConfigError(
                f"{communicator.size} ranks that decode are more than the {max(height, width)} latent "
                f"{'columns' if self.axis == -1 else 'rows'} of a picture"
            )

    def mine(self, x: Tensor) -> Tensor:
        """This rank's strip of a whole latent."""
        rank = self._communicator.rank
        return x.narrow(self.axis, sum(self.sizes[:rank]), self.sizes[rank])

    def with_halo(self, shard: Tensor, reach: int) -> Tensor:
        """The strip with `reach` rows or columns of its neighbours on either side; zeros beyond the picture's edges."""
        rank, last = self._communicator.rank, self._communicator.size - 1
        edge = list(shard.shape)
        edge[self.axis] = reach
        beyond = {other: edge for other in (rank - 1, rank + 1) if 0 <= other <= last}
        shapes: list[Sequence[int]] = [beyond.get(other, (0,)) for other in range(last + 1)]
        sent = self._communicator.buffer("halo out", shapes, shard)
        if rank > 0:
            sent[rank - 1].copy_(shard.narrow(self.axis, 0, reach))
        if rank < last:
            sent[rank + 1].copy_(shard.narrow(self.axis, shard.shape[self.axis] - reach, reach))
        arrived = self._communicator.all_to_all("halo", LAYERLESS, shapes, sent).wait()
        nothing = shard.new_zeros(edge)
        before, after = (arrived[r] if r in beyond else nothing for r in (rank - 1, rank + 1))
        return torch.cat([before, shard, after], self.axis)

    def whole(self, shard: Tensor) -> Tensor:
        """All strips side by side, on every rank."""
        shapes = self._shapes(shard)
        block = max(torch.Size(shape).numel() for shape in shapes)
        (sent,) = self._communicator.buffer("mid out", [shard.shape], shard, block=block)
        sent.copy_(shard)
        return torch.cat(self._communicator.all_gather("mid", LAYERLESS, shapes, sent).wait(), self.axis)

    def gather_to_first(self, shard: Tensor) -> Tensor | None:
        """All strips side by side on the first rank; None on the others."""
        arrived = self._communicator.gather_to_first("pixels", self._shapes(shard), shard)
        return torch.cat(arrived, self.axis) if self._communicator.rank == 0 else None

    def _shapes(self, shard: Tensor) -> list[list[int]]:
        """The shape of every rank's strip at the scale of this rank's."""
        scale = shard.shape[self.axis] // self.sizes[self._communicator.rank]
        shapes = []
        for size in self.sizes:
            shape = list(shard.shape)
            shape[self.axis] = size * scale
            shapes.append(shape)
        return shapes
