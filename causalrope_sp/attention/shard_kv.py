"""The strategy shard-kv: keys and values stay on the rank that computed them, and queries travel to all ranks.

A layer makes two collectives: an all-gather of the queries, and an all-to-all that returns partial outputs with their
log-sum-exp. A rank caches 1/P of the tokens. While the others' queries are in flight, it attends with its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from causalrope_kernels import Partial, PassOperations, Projection, Slots, Source
from causalrope_sp.attention.base import InnerStrategy, by_chunk, lse_elements, merged, parts_of
from causalrope_sp.cache.layer_cache import LayerCache
from causalrope_sp.grid import Chunk


class ShardKV(InnerStrategy):
    """Attends the queries of all ranks on this rank's keys, and merges the partial outputs of its own queries.

    With `overlap`, this rank's own queries attend while the others' are in flight.
    """

    name = "shard-kv"

    def stored(self, x_BLHD: Tensor) -> Tensor:
        return x_BLHD.tensor_split(self._communicator.size, 1)[self._communicator.rank]

    def attend(self, source: Source, cache: LayerCache, chunks: Sequence[Chunk], operations: PassOperations) -> Tensor:
        batch, frames, _, heads, width = source.shape
        placement = self.placements[cache.index] if self.placements else None
        shapes = [(batch, frames, tokens, heads, width) for tokens in self._tokens]
        own_rank = self._communicator.rank
        (q,) = self._communicator.buffer("q out", [shapes[own_rank]], source.like, block=max(map(prod, shapes)))
        q_slots = [Slots(q)] if placement is None else placement.by_head([Slots(q)])
        operations.norm_rope_store(source, q=q_slots)
        handle = self._communicator.all_gather("q", cache.index, shapes, q)
        received = None if self._overlap else handle.wait()
        partials: list[list[Partial]] = [[] for _ in self._tokens]
        k_offset = cache.k_offset if isinstance(source, Projection) else None  # keys of pieces are quantized
        for chunk, part in by_chunk(chunks):
            k_slots, v_slots = cache.kv_slots(chunk)
            operations.norm_rope_store(source.part(part), k=k_slots, v=v_slots, k_offset=k_offset)
            own = parts_of(q[:, part], cache.keys(chunk, own_rank), operations)
            partials[own_rank].append(merged(own, operations))
            if received is None:
                received = handle.wait()
            for rank, queries in enumerate(received):
                if rank != own_rank:
                    others = parts_of(queries[:, part], cache.keys(chunk, rank), operations)
                    partials[rank].append(merged(others, operations))
        output = self._return_partials(partials, q, cache.index, operations)
        return output if placement is None else placement.in_model_order(output, 3)

    def _return_partials(
        self, partials: Sequence[Sequence[Partial]], like: Tensor, layer: int, operations: PassOperations
    ) -> Tensor:
        """Sends every rank the partial outputs of its queries and merges those of this rank's queries.

        The log-sum-exps follow a rank's outputs in the buffer, in their own, wider dtype, since the merge weighs by
        them.
        """
        batch, frames, _, heads, width = like.shape
        wide, lse_dtype = lse_elements(like.element_size()), partials[0][0][1].dtype
        rows = [batch * frames * tokens for tokens in self._tokens]
        sizes = [(count * heads * (width + wide),) for count in rows]

        def unpack(piece: Tensor, tokens: int) -> Partial:
            output, lse = piece.split([piece.numel() // (width + wide) * each for each in (width, wide)])
            shape = batch, frames * tokens, heads
            return output.view(*shape, width), lse.view(lse_dtype).view(shape)

        sent = self._communicator.buffer("partial out", sizes, like)
        for piece, parts, tokens in zip(sent, partials, self._tokens, strict=True):
            for whole, by_chunks in zip(unpack(piece, tokens), zip(*parts, strict=True), strict=True):
                torch.cat(by_chunks, 1, out=whole)
        rank, size = self._communicator.rank, self._communicator.size
        received = self._communicator.all_to_all("partial", layer, [sizes[rank]] * size, sent).wait()
        return operations.merge([unpack(piece, self._tokens[rank]) for piece in received])[0].view(like.shape)
