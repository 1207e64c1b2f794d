"""Spatial shards for parallel VAE decoding: every rank decodes a part of a picture, cut along its longer axis.

Shards differ by at most one latent row or column, and scale with the picture from layer to layer. Convolutions exchange
halos with the neighbouring ranks; the decoder's attention gathers all shards.
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
    """The shards of a latent of height×width, one per rank.

    Args:
        communicator: the ranks that decode.
        height: in latent pixels.
        width: in latent pixels.

    Attributes:
        axis: the axis that is cut, -1 for the width or -2 for the height.
        sizes: the latent rows or columns of every rank's shard.

    Raises:
        ConfigError: there are more ranks than the longer side has latent pixels.
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

    @property
    def first(self) -> bool:
        """Whether this rank is the one that gathers."""
        return self._communicator.rank == 0

    def mine(self, x: Tensor) -> Tensor:
        """Returns this rank's shard of a whole latent, or of a whole picture of any layer, as a view."""
        rank, scale = self._communicator.rank, x.shape[self.axis] // sum(self.sizes)
        return x.narrow(self.axis, sum(self.sizes[:rank]) * scale, self.sizes[rank] * scale)

    def with_halo(self, shard: Tensor, reach: int) -> Tensor:
        """Exchanges halos with the neighbouring ranks.

        Args:
            shard: this rank's shard.
            reach: the width of a halo in rows or columns.

        Returns:
            The shard with `reach` rows or columns of its neighbours on either side, zeros beyond the picture's edges.

        Raises:
            RankLostError: the collective failed.
        """
        rank, last = self._communicator.rank, self._communicator.size - 1
        halo = list(shard.shape)
        halo[self.axis] = reach
        neighbours = {other: halo for other in (rank - 1, rank + 1) if 0 <= other <= last}
        shapes: list[Sequence[int]] = [neighbours.get(other, (0,)) for other in range(last + 1)]
        sent = self._communicator.buffer("halo out", shapes, shard)
        if rank > 0:
            sent[rank - 1].copy_(shard.narrow(self.axis, 0, reach))
        if rank < last:
            sent[rank + 1].copy_(shard.narrow(self.axis, shard.shape[self.axis] - reach, reach))
        received = self._communicator.all_to_all("halo", LAYERLESS, shapes, sent).wait()
        zeros = shard.new_zeros(halo)
        before, after = (received[r] if r in neighbours else zeros for r in (rank - 1, rank + 1))
        return torch.cat([before, shard, after], self.axis)

    def whole(self, shard: Tensor) -> Tensor:
        """Gathers all shards and returns the whole picture on every rank.

        Raises:
            RankLostError: the collective failed.
        """
        shapes = self._shapes(shard)
        block = max(torch.Size(shape).numel() for shape in shapes)
        (sent,) = self._communicator.buffer("mid out", [shard.shape], shard, block=block)
        sent.copy_(shard)
        return torch.cat(self._communicator.all_gather("mid", LAYERLESS, shapes, sent).wait(), self.axis)

    def gather_to_first(self, shard: Tensor, kind: str = "pixels") -> Tensor | None:
        """Gathers all shards and returns the whole picture on the first rank, None on the others.

        Args:
            shard: this rank's shard.
            kind: the kind of the collective, for `CommStats`.

        Raises:
            RankLostError: the collective failed.
        """
        received = self._communicator.gather_to_first(kind, self._shapes(shard), shard)
        return torch.cat(received, self.axis) if self.first else None

    def _shapes(self, shard: Tensor) -> list[list[int]]:
        """The shape of every rank's shard at the scale of this rank's."""
        scale = shard.shape[self.axis] // self.sizes[self._communicator.rank]
        shapes = []
        for size in self.sizes:
            shape = list(shard.shape)
            shape[self.axis] = size * scale
            shapes.append(shape)
        return shapes
