"""shard-kv: keys and values stay where they were made; queries go to them, and partial results come back.

Two collectives a layer: the queries to all, and the partial outputs with their log-sum-exp back. The cache holds 1/P of
the tokens. While the others' queries are in flight, a rank attends with its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from causalrope_kernels import Partial, Slots, Source, merge, norm_rope_store
from causalrope_sp.attention.base import Strategy, by_chunk, lse_elements, parts_of
from causalrope_sp.cache.kv_cache import LayerCache
from causalrope_sp.distributed.communicator import Communicator
from causalrope_sp.grid import Chunk


class ShardKV(Strategy):
    """
    Args:
        exchange: the ranks that share the tokens.
        tokens: of a frame, rank by rank.
        heads: of how many heads.
        overlap: attend with this rank's own queries while the others' are in flight.
        backend: of attention.
    """

    name = "shard-kv"

    def __init__(
        self, communicator: Communicator, tokens: Sequence[int], heads: int, overlap: bool, backend: str
    ) -> None:
        super().__init__(tokens[communicator.rank], heads, backend)
        self._communicator, self._tokens, self._overlap = communicator, tokens, overlap

    def stored(self, x_BLHD: Tensor) -> Tensor:
        return x_BLHD.tensor_split(self._communicator.size, 1)[self._communicator.rank]

    def attend(self, source: Source, cache: LayerCache, chunks: Sequence[Chunk]) -> Tensor:
        batch, frames, _, _, width = source.shape
        shapes, me = self._shapes(batch, frames, width), self._communicator.rank
        (q,) = self._communicator.buffer("q out", [shapes[me]], source.like, block=max(map(prod, shapes)))
        norm_rope_store(source, q=[Slots(q)])
        handle = self._communicator.all_gather("q", cache.index, shapes, q)
        arrived = None if self._overlap else handle.wait()
        partials: list[list[Partial]] = [[] for _ in self._tokens]
        for chunk, part in by_chunk(chunks):
            k_slots, v_slots = cache.kv_slots(chunk)
            norm_rope_store(source.part(part), k=[k_slots], v=[v_slots])
            partials[me].append(merge(parts_of(q[:, part], cache.keys(chunk), self.backend)))
            if arrived is None:
                arrived = handle.wait()
            for rank, queries in enumerate(arrived):
                if rank != me:
                    partials[rank].append(merge(parts_of(queries[:, part], cache.keys(chunk), self.backend)))
        return self._bring_home(partials, q, cache.index)

    def _bring_home(self, partials: Sequence[Sequence[Partial]], like: Tensor, layer: int) -> Tensor:
        """Every rank's partial results to that rank, and this rank's from all of them, merged.

        The log-sum-exps ride behind a rank's outputs, in their own, wider type: they are what the merge weighs by.
        """
        batch, frames, _, _, width = like.shape
        wide, lse_dtype = lse_elements(like.element_size()), partials[0][0][1].dtype
        rows = [batch * frames * tokens for tokens in self._tokens]
        sizes = [(count * self.heads * (width + wide),) for count in rows]

        def opened(piece: Tensor, tokens: int) -> Partial:
            output, lse = piece.split([piece.numel() // (width + wide) * each for each in (width, wide)])
            shape = batch, frames * tokens, self.heads
            return output.view(*shape, width), lse.view(lse_dtype).view(shape)

        sent = self._communicator.buffer("partial out", sizes, like)
        for piece, parts, tokens in zip(sent, partials, self._tokens, strict=True):
            for whole, found in zip(opened(piece, tokens), zip(*parts, strict=True), strict=True):
                torch.cat(found, 1, out=whole)
        mine = self._communicator.rank
        back = self._communicator.all_to_all("partial", layer, [sizes[mine]] * self._communicator.size, sent).wait()
        return merge([opened(piece, self._tokens[mine]) for piece in back])[0].view(like.shape)

    def _shapes(self, batch: int, frames: int, width: int) -> list[tuple[int, ...]]:
        return [(batch, frames, tokens, self.heads, width) for tokens in self._tokens]
