"""Ulysses (arXiv 2309.14509): trade tokens for heads, attend whole sequences of some heads, trade back.

Two collectives a layer: q, k, v packed on the way in, the output on the way back. The cache holds 1/P of the heads.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from causalrope_sp.cache import LayerCache
from causalrope_sp.errors import ConfigError
from causalrope_sp.grid import Chunk, Shard
from causalrope_sp.parallel.exchange import all_to_all
from causalrope_sp.parallel.strategy import Strategy


class Ulysses(Strategy):
    """
    Raises:
        ConfigError: more ranks than heads, or ranks that do not divide the heads.
    """

    name = "ulysses"

    def __init__(self, shard: Shard, heads: int, group: dist.ProcessGroup) -> None:
        super().__init__(shard, heads)
        if shard.ranks > heads:
            raise ConfigError(
                f"ulysses needs at least one head a rank: {heads} heads, {shard.ranks} ranks; use gather-kv"
            )
        if heads % shard.ranks:
            raise ConfigError(
                f"ulysses needs ranks that divide the heads: {heads} heads, {shard.ranks} ranks; use gather-kv"
            )
        self._group = group
        self._tokens = [other.tokens for other in shard.all]

    @property
    def stored_heads(self) -> int:
        return self.heads // self.shard.ranks

    def attend(
        self, q_BTHD: Tensor, k_BTHD: Tensor, v_BTHD: Tensor, cache: LayerCache, chunks: tuple[Chunk, ...]
    ) -> Tensor:
        mine_3BFSHD = self._frames(torch.stack([q_BTHD, k_BTHD, v_BTHD]).flatten(0, 1))
        batch, frames, _, _, width = mine_3BFSHD.shape
        pieces = mine_3BFSHD.split(self.stored_heads, 3)
        shapes = [(batch, frames, tokens, self.stored_heads, width) for tokens in self._tokens]
        q, k, v = torch.cat(all_to_all(pieces, shapes, self._group), 2).chunk(3)
        output_BFSHD = self._attend_whole(q, k, v, cache, chunks)
        shape = (batch // 3, frames, self.shard.tokens, self.stored_heads, width)
        returned = all_to_all(output_BFSHD.split(self._tokens, 2), [shape] * self.shard.ranks, self._group)
        return torch.cat(returned, 3).flatten(1, 2)
