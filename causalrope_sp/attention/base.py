"""The base class of attention strategies, which is the strategy of one rank, and helpers that the others share.

A strategy writes q, k and v, normed and rotated by their global index, directly into a send buffer or into the slots of
the cache. Each strategy decides which tokens and heads its rank caches.

Shapes: B batch, F frames of the pass, s tokens of a frame on this rank, S tokens of a whole frame, H heads, h heads on
this rank, d head width, L keys, Q queries of a frame.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from causalrope_kernels import Keys, Partial, PassOperations, Projection, Slots, Source
from causalrope_sp.attention.quantized_pieces import KeptPieces
from causalrope_sp.cache.layer_cache import LayerCache
from causalrope_sp.distributed.communicator import Communicator
from causalrope_sp.grid import Chunk
from causalrope_sp.heads.cached_heads import CachedHeads
from causalrope_sp.heads.placement import HeadPlacement


class Strategy:
    """Attends within one rank, without any collective.

    Args:
        tokens: s, the tokens of a frame that this rank owns.
        heads: h, the heads that this rank attends.
        backend: the attention backend, one of `causalrope_kernels.ATTENTION_BACKENDS`.
        placements: the order in which this rank holds the heads of each layer; empty for the order of the source.

    Attributes:
        placements: the order in which this rank holds the heads of each layer; empty for the order of the source.
        cached: the rings that this rank caches the heads in; None for one ring.
    """

    cached: CachedHeads | None = None

    def __init__(
        self, tokens: int, heads: int, backend: str = "auto", placements: Sequence[HeadPlacement] = ()
    ) -> None:
        self.tokens, self.heads, self.backend = tokens, heads, backend
        self.placements = placements
        self._kept = KeptPieces()  # of what strategies of several ranks send in 8 bits

    @property
    def frame_tokens(self) -> int:
        """S, the tokens of a frame on all ranks."""
        return self.tokens

    @property
    def stored_tokens(self) -> int:
        """The number of tokens of a frame that this rank caches."""
        return self.tokens

    @property
    def stored_heads(self) -> int:
        """The number of heads that this rank caches."""
        return self.heads

    def stored(self, x_BLHD: Tensor) -> Tensor:
        """Selects what this rank caches from keys or values that every rank holds whole.

        Over the ranks that a query is attended on, every key is cached exactly once.

        Args:
            x_BLHD: all keys or all values.

        Returns:
            The part that this rank caches.
        """
        return x_BLHD

    def heads_cached(self, layer: int, heads: int) -> Sequence[int]:
        """Returns the numbers of the heads that this rank caches, in the order in which it holds them.

        Args:
            layer: the number of the layer.
            heads: the heads of the model.
        """
        return self.placements[layer].order if self.placements else range(heads)

    def splits_at(self, chunks: Sequence[Chunk]) -> int:
        """Returns the global time index at which a pass splits the frames that it attends in two; 0 for no split."""
        return 0

    def attend(self, source: Source, cache: LayerCache, chunks: Sequence[Chunk], operations: PassOperations) -> Tensor:
        """Writes the keys and values of a pass to the cache and attends with its queries.

        Args:
            source: q, k and v of this rank's tokens.
            cache: the cache of the layer, whose `k_offset` is set if it has one.
            chunks: the chunks of the pass, in order of time.
            operations: the operations of the pass.

        Returns:
            What this rank's queries attend, (B, F, s, h, d), with the heads in the order of the source.
        """
        placement = self.placements[cache.index] if self.placements else None
        if len(chunks) == 1:
            return attend_chunk(source, cache, chunks[0], operations, placement)
        # in order of time, since a later chunk may overwrite slots that an earlier one still reads
        parts = by_chunk(chunks)
        return joined([attend_chunk(source.part(f), cache, chunk, operations, placement) for chunk, f in parts])

    def key_mean(self, source: Source, layer: int, first: Chunk, operations: PassOperations) -> Tensor:
        """Returns the mean of the keys of all ranks' tokens of a chunk, which is taken off quantized keys.

        Args:
            source: q, k and v of this rank's tokens, of a pass.
            layer: the number of the layer.
            first: the first chunk of the pass.
            operations: the operations of the pass.

        Returns:
            The mean, (B, N, d) in float64, of all heads in the order of the source.
        """
        total = self.total(key_sum(source.part(slice(first.frames)), operations), layer)
        return total / (first.frames * self.frame_tokens)

    def total(self, x: Tensor, layer: int) -> Tensor:
        """Returns the sum of a tensor, of one number of each layer, over the ranks that own different tokens."""
        return x


class InnerStrategy(Strategy):
    """A strategy on ranks that own different tokens and attend the same heads.

    Args:
        communicator: the ranks that share the tokens.
        tokens: the tokens of a frame that each rank owns, in order of rank.
        heads: the heads that this rank attends.
        overlap: attend what is there while the rest is in flight.
        backend: the attention backend.
        placements: see `Strategy`.
    """

    def __init__(
        self,
        communicator: Communicator,
        tokens: Sequence[int],
        heads: int,
        overlap: bool,
        backend: str,
        placements: Sequence[HeadPlacement] = (),
    ) -> None:
        super().__init__(tokens[communicator.rank], heads, backend, placements)
        self._communicator, self._tokens, self._overlap = communicator, tokens, overlap

    @property
    def frame_tokens(self) -> int:
        return sum(self._tokens)

    def total(self, x: Tensor, layer: int) -> Tensor:
        return sum_of_ranks(x, self._communicator, layer)


def attend_chunk(
    source: Source, cache: LayerCache, chunk: Chunk, operations: PassOperations, placement: HeadPlacement | None
) -> Tensor:
    """Writes a chunk's keys and values to the cache and returns what its queries attend, (B, F, s, h, d).

    The placement is that of the layer's heads on this rank; None keeps the order of the source.
    """
    q = write_chunk(source, cache, chunk, operations, placement)
    q_BTHD, groups = q.flatten(1, 2), cache.keys(chunk)
    if len(groups) == 1:
        output = operations.attention(q_BTHD, groups[0], reuse_q=operations.in_place)
    else:
        output = attend_groups(q_BTHD, groups, operations)
    output = output.view(q.shape)
    return output if placement is None else placement.in_model_order(output, 3)


def write_chunk(
    source: Source, cache: LayerCache, chunk: Chunk, operations: PassOperations, placement: HeadPlacement | None
) -> Tensor:
    """Writes a chunk's keys and values to the cache and returns its queries, (B, F, s, h, d), in the order of the
    placement."""
    q = empty(source)
    k_slots, v_slots = cache.kv_slots(chunk)
    q_slots = [Slots(q)] if placement is None else placement.by_head([Slots(q)])
    k_offset = cache.k_offset if isinstance(source, Projection) else None  # keys of pieces are quantized
    operations.norm_rope_store(source, q=q_slots, k=k_slots, v=v_slots, k_offset=k_offset)
    return q


def key_sum(source: Source, operations: PassOperations) -> Tensor:
    """Returns the sum of the keys of all tokens, (B, H, d), in float64, so that its order hardly matters."""
    k = empty(source)
    operations.norm_rope_store(source, k=[Slots(k)])
    return k.sum((1, 2), dtype=torch.float64)


def sum_of_ranks(x: Tensor, communicator: Communicator, layer: int) -> Tensor:
    """Returns the sum of a tensor of each rank, added in order of rank."""
    (sent,) = communicator.buffer("key sum out", [x.shape], x)
    sent.copy_(x)
    return torch.stack(communicator.all_gather("key sum", layer, [x.shape] * communicator.size, sent).wait()).sum(0)


def empty(source: Source) -> Tensor:
    """Allocates a tensor for one of q, k, v, (B, F, s, h, d)."""
    return source.like.new_empty(source.shape)


def joined(outputs: Sequence[Tensor]) -> Tensor:
    """Concatenates the outputs of chunks along the axis of frames."""
    return outputs[0] if len(outputs) == 1 else torch.cat(tuple(outputs), 1)


def by_chunk(chunks: Sequence[Chunk]) -> list[tuple[Chunk, slice]]:
    """Returns every chunk with the slice of the pass' frames that are its own."""
    first = chunks[0].start
    return [(chunk, slice(chunk.start - first, chunk.stop - first)) for chunk in chunks]


def by_group(q_BTHD: Tensor, groups: Sequence[Keys]) -> list[tuple[Tensor, Keys]]:
    """Returns the keys of every head group with the queries of its heads."""
    if len(groups) == 1:
        return [(q_BTHD, groups[0])]
    return list(zip(q_BTHD.split([keys.k.shape[2] for keys in groups], 2), groups, strict=True))


def attend_groups(q_BTHD: Tensor, groups: Sequence[Keys], operations: PassOperations) -> Tensor:
    """Attends with the heads of every group on its keys."""
    if not groups:
        return q_BTHD  # of no heads
    outputs = [operations.attention(q, keys) for q, keys in by_group(q_BTHD, groups)]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 2)


def parts_of(q_BFQHD: Tensor, groups: Sequence[Keys], operations: PassOperations) -> list[list[Partial]]:
    """Attends over parts of the keys; returns for every head group outputs, (B, F·Q, h, d), with log-sum-exps,
    (B, F·Q, h)."""
    q_BTHD = q_BFQHD.flatten(1, 2)
    if len(groups) == 1:
        return [operations.attention_parts(q_BTHD, groups[0])]
    return [operations.attention_parts(q, keys) for q, keys in by_group(q_BTHD, groups)]


def merged(parts: Sequence[Sequence[Partial]], operations: PassOperations) -> Partial:
    """Merges the parts of every head group and joins the groups' heads."""
    if len(parts) == 1:
        return operations.merge(parts[0])
    outputs, lses = zip(*[operations.merge(group) for group in parts], strict=True)
    return torch.cat(outputs, 2), torch.cat(lses, 2)


def lse_elements(itemsize: int) -> int:
    """Returns how many numbers of `itemsize` bytes a log-sum-exp takes in a collective: it is float32 or wider."""
    return max(1, 4 // itemsize)
