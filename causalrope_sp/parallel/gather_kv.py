"""gather-kv: every rank keeps its own queries and gathers the keys and values of the new chunk alone.

One collective a layer: k and v packed. What is cached never travels again; each rank holds the whole cache.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from causalrope_sp.cache import LayerCache
from causalrope_sp.grid import Chunk, Shard
from causalrope_sp.parallel.exchange import all_gather
from causalrope_sp.parallel.strategy import Strategy


class GatherKV(Strategy):
    name = "gather-kv"

    def __init__(self, shard: Shard, heads: int, group: dist.ProcessGroup) -> None:
        super().__init__(shard, heads)
        self._group = group
        self._tokens = [other.tokens for other in shard.all]

    def attend(
        self, q_BTHD: Tensor, k_BTHD: Tensor, v_BTHD: Tensor, cache: LayerCache, chunks: tuple[Chunk, ...]
    ) -> Tensor:
        mine_2BFSHD = self._frames(torch.cat([k_BTHD, v_BTHD]))
        k, v = torch.cat(all_gather(mine_2BFSHD, self._tokens, 2, self._group), 2).chunk(2)
        return self._attend_whole(self._frames(q_BTHD), k, v, cache, chunks).flatten(1, 2)
