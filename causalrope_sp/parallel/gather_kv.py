"""gather-kv: every rank keeps its own queries and gathers the keys and values of the new chunk alone.

One collective a layer: k and v packed. What is cached never travels again; each rank holds all tokens. While the
new keys and values are in flight, the queries attend what is cached already.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from causalrope_kernels import attention
from causalrope_sp.cache import LayerCache
from causalrope_sp.grid import Chunk
from causalrope_sp.parallel.exchange import Exchange
from causalrope_sp.parallel.strategy import Placed, Strategy, attend_stretches, by_chunk, merged


class GatherKV(Strategy):
    """
    Args:
        exchange: the ranks that share the tokens.
        tokens: of a frame, rank by rank.
        heads: of how many heads.
        overlap: attend the cached window while the new keys and values are in flight.
    """

    name = "gather-kv"

    def __init__(self, exchange: Exchange, tokens: Sequence[int], heads: int, overlap: bool) -> None:
        super().__init__(tokens[exchange.rank], heads)
        self._exchange, self._tokens, self._overlap = exchange, tokens, overlap

    @property
    def stored_tokens(self) -> int:
        return sum(self._tokens)

    def place(self, batch: int, frames: int, like: Tensor) -> Placed:
        shapes = self._shapes(batch, frames, like.shape[-1])
        mine = shapes[self._exchange.rank]
        (sent,) = self._exchange.buffer("kv out", [mine], like, block=max(map(prod, shapes)))
        return Placed([(like.new_empty(mine[1:]), *sent)], [sent])

    def attend(self, placed: Placed, cache: LayerCache, chunks: Sequence[Chunk]) -> Tensor:
        ((q, _, _),) = placed.pieces
        batch, frames, _, _, width = q.shape
        shapes = self._shapes(batch, frames, width)
        on_the_way = self._exchange.all_gather("kv", cache.index, shapes, *placed.sent)
        passes = by_chunk(chunks)
        before = []
        if self._overlap:
            old = [cache.window.stretches(chunk, since=chunks[0].start)[0] for chunk in chunks]
            before = [attend_stretches(q[:, part], cache, known) for (_, part), known in zip(passes, old, strict=True)]
        arrived = on_the_way.wait()
        outputs = []
        for number, (chunk, part) in enumerate(passes):
            start = 0
            for piece, tokens in zip(arrived, self._tokens, strict=True):
                cache.write(chunk, *piece[:, :, part], tokens=slice(start, start + tokens))
                start += tokens
            if self._overlap:
                new = cache.window.stretches(chunk, since=chunks[0].start)[1]
                outputs.append(merged(before[number] + attend_stretches(q[:, part], cache, new))[0])
            else:
                mine = q[:, part]
                outputs.append(attention(mine.flatten(1, 2), *cache.read(chunk)).view(mine.shape))
        return torch.cat(outputs, 1)

    def _shapes(self, batch: int, frames: int, width: int) -> list[tuple[int, ...]]:
        return [(2, batch, frames, tokens, self.heads, width) for tokens in self._tokens]
