"""The strategy gather-kv: every rank keeps its queries and gathers the keys and values of the new chunk.

A layer makes one collective, an all-gather of k and v packed, in 8 bits if that is what is stored. Every rank caches
all tokens, so cached keys and values are never sent again. While the new ones are in flight, the queries attend the
cached ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from torch import Tensor

from causalrope_kernels import Partial, PassOperations, Pieces, Projection, Slots, Source
from causalrope_sp.attention.base import InnerStrategy, by_chunk, empty, joined, merged, parts_of
from causalrope_sp.attention.quantized_pieces import piece_shapes
from causalrope_sp.cache.layer_cache import LayerCache
from causalrope_sp.distributed.communicator import Shape
from causalrope_sp.grid import Chunk


class GatherKV(InnerStrategy):
    """Attends this rank's queries on all keys, which it gathers.

    With `overlap`, queries attend the cached window while the new keys and values are in flight.
    """

    name = "gather-kv"

    @property
    def stored_tokens(self) -> int:
        return self.frame_tokens

    def splits_at(self, chunks: Sequence[Chunk]) -> int:
        return chunks[0].start if self._overlap else 0  # the frames before it are attended while the new are in flight

    def attend(self, source: Source, cache: LayerCache, chunks: Sequence[Chunk], operations: PassOperations) -> Tensor:
        batch, frames, _, heads, width = source.shape
        placement = self.placements[cache.index] if self.placements else None
        sizes, rank = [(2, batch, frames, tokens, heads, width) for tokens in self._tokens], self._communicator.rank
        shapes: Sequence[Shape] = sizes if cache.quantized is None else piece_shapes(sizes, source.like)
        (sent,) = self._communicator.buffer("kv out", [shapes[rank]], source.like, block=max(map(prod, shapes)))
        k: Sequence[Slots]
        v: Sequence[Slots]
        if cache.quantized is None:
            k, v = [Slots(sent[0])], [Slots(sent[1])]
        else:
            _, k, v = self._kept.sent("kv out", [sent], [sizes[rank]], cache.quantized)
        if placement is not None:
            k, v = placement.by_head(k), placement.by_head(v)
        k_offset = cache.k_offset if isinstance(source, Projection) else None  # keys of pieces are quantized
        operations.norm_rope_store(source, k=k, v=v, k_offset=k_offset)
        handle = self._communicator.all_gather("kv", cache.index, shapes, sent)
        q = empty(source)
        operations.norm_rope_store(source, q=[Slots(q)] if placement is None else placement.by_head([Slots(q)]))
        parts = by_chunk(chunks)
        before: list[list[list[Partial]]] = [[] for _ in chunks]
        since = self.splits_at(chunks)
        if since:
            before = [parts_of(q[:, part], cache.keys_before(chunk, since), operations) for chunk, part in parts]
        arrived = handle.wait()
        received: Source = Pieces(arrived)
        if cache.quantized is not None:
            received = self._kept.received("kv in", arrived, sizes, cache.quantized)
        outputs = []
        for (chunk, part), old in zip(parts, before, strict=True):
            own = received if len(parts) == 1 else received.part(part)
            k_slots, v_slots = cache.kv_slots(chunk)
            operations.norm_rope_store(own, k=k_slots, v=v_slots)
            new = parts_of(q[:, part], cache.keys_since(chunk, since), operations)
            both = [[*a, *b] for a, b in zip(old, new, strict=True)] if old else new
            outputs.append(merged(both, operations)[0].view(q[:, part].shape))
        output = joined(outputs)
        return output if placement is None else placement.in_model_order(output, 3)
