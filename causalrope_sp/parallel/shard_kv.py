"""shard-kv: keys and values stay where they were made; queries go to them, and partial results come back.

Two collectives a layer: the queries to all, and the partial outputs with their log-sum-exp back. The cache holds 1/P of
the tokens. While the others' queries are in flight, a rank attends with its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from causalrope_sp.cache import LayerCache
from causalrope_sp.grid import Chunk
from causalrope_sp.parallel.exchange import Exchange
from causalrope_sp.parallel.strategy import Partial, Placed, Strategy, attend_all, by_chunk, lse_elements, merged


class ShardKV(Strategy):
    """
    Args:
        exchange: the ranks that share the tokens.
        tokens: of a frame, rank by rank.
        heads: of how many heads.
        overlap: attend with this rank's own queries while the others' are in flight.
    """

    name = "shard-kv"

    def __init__(self, exchange: Exchange, tokens: Sequence[int], heads: int, overlap: bool) -> None:
        super().__init__(tokens[exchange.rank], heads)
        self._exchange, self._tokens, self._overlap = exchange, tokens, overlap

    def place(self, batch: int, frames: int, like: Tensor) -> Placed:
        shapes = self._shapes(batch, frames, like.shape[-1])
        mine = shapes[self._exchange.rank]
        (sent,) = self._exchange.buffer("q out", [mine], like, block=max(map(prod, shapes)))
        return Placed([(sent, like.new_empty(mine), like.new_empty(mine))], [sent])

    def attend(self, placed: Placed, cache: LayerCache, chunks: Sequence[Chunk]) -> Tensor:
        ((q, k, v),) = placed.pieces
        batch, frames, _, _, width = q.shape
        shapes, me = self._shapes(batch, frames, width), self._exchange.rank
        on_the_way = self._exchange.all_gather("q", cache.index, shapes, *placed.sent)
        arrived = None if self._overlap else on_the_way.wait()
        partials: list[list[Partial]] = [[] for _ in self._tokens]
        for chunk, part in by_chunk(chunks):
            cache.write(chunk, k[:, part], v[:, part])
            partials[me].append(attend_all(q[:, part], cache, chunk))
            if arrived is None:
                arrived = on_the_way.wait()
            for rank, queries in enumerate(arrived):
                if rank != me:
                    partials[rank].append(attend_all(queries[:, part], cache, chunk))
        return self._bring_home(partials, q, cache.index)

    def _bring_home(self, partials: Sequence[Sequence[Partial]], like: Tensor, layer: int) -> Tensor:
        """Every rank's partial results to that rank, and this rank's from all of them, merged.

        The log-sum-exp rides behind the output's d numbers, in its own, wider type: it is what the merge weighs by.
        """
        batch, frames, _, _, width = like.shape
        wide = lse_elements(like.element_size())
        room = self._shapes(batch, frames, width + wide)
        sent = self._exchange.buffer("partial out", room, like)
        for piece, parts in zip(sent, partials, strict=True):
            output, lse = (torch.cat(x, 1) for x in zip(*parts, strict=True))
            piece[..., :width] = output
            piece[..., width:] = lse.unsqueeze(-1).view(like.dtype)
        back = [room[self._exchange.rank]] * self._exchange.size
        arrived = self._exchange.all_to_all("partial", layer, back, sent).wait()
        lse_dtype = partials[0][0][1].dtype
        found = [(p[..., :width], p[..., width:].contiguous().view(lse_dtype).squeeze(-1)) for p in arrived]
        return merged(found)[0]

    def _shapes(self, batch: int, frames: int, width: int) -> list[tuple[int, ...]]:
        return [(batch, frames, tokens, self.heads, width) for tokens in self._tokens]
