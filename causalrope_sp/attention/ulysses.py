"""The strategy ulysses (arXiv 2309.14509): an all-to-all exchanges a share of the tokens for a share of the heads.

A layer makes two collectives: an all-to-all of q, k and v packed before attention, k and v in 8 bits if that is what is
stored, and one of the output after it. The number of heads need not be divisible by the number of ranks. Within a share
of the heads an inner strategy may share the tokens among further ranks; this class is then the outer strategy of a
product.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from causalrope_kernels import Keys, PassOperations, Pieces, Slots, Source
from causalrope_sp.attention.base import Strategy, attend_groups, by_chunk, joined, sum_of_ranks, write_chunk
from causalrope_sp.attention.quantized_pieces import piece_shapes
from causalrope_sp.cache.layer_cache import LayerCache
from causalrope_sp.distributed.communicator import AsyncHandle, Communicator, Shape
from causalrope_sp.grid import Chunk, shares
from causalrope_sp.heads.placement import HeadPlacement


class Ulysses(Strategy):
    """Attends all tokens of a row of ranks with this rank's share of the heads.

    Args:
        communicator: the ranks that exchange tokens for heads.
        tokens: the tokens of a frame that each of these ranks owns, in order of rank.
        placements: the heads that each of these ranks attends, in order of rank, layer by layer.
        inner: the strategy that attends the tokens of all these ranks with this rank's heads.
        head_groups: the groups of heads whose outputs are sent one by one, each while the next is computed (PipeSP,
            arXiv 2511.12056); 1 sends the whole output at once.
    """

    def __init__(
        self,
        communicator: Communicator,
        tokens: Sequence[int],
        placements: Sequence[HeadPlacement],
        inner: Strategy,
        head_groups: int = 1,
    ) -> None:
        super().__init__(tokens[communicator.rank], sum(placements[0].sizes), inner.backend, placements)
        self._communicator, self._tokens, self._inner = communicator, tokens, inner
        # every rank's heads in each group, layer by layer
        self._heads_by_group = [list(zip(*_split(at.sizes, head_groups), strict=True)) for at in placements]
        self._pipelined = head_groups > 1

    @property
    def frame_tokens(self) -> int:
        return self._inner.frame_tokens

    def total(self, x: Tensor, layer: int) -> Tensor:
        return self._inner.total(sum_of_ranks(x, self._communicator, layer), layer)

    @property
    def stored_tokens(self) -> int:
        return self._inner.stored_tokens

    @property
    def stored_heads(self) -> int:
        return self._inner.stored_heads

    def stored(self, x_BLHD: Tensor) -> Tensor:
        own = self.placements[0].columns[self._communicator.rank]  # whoever asks has the same heads in all layers
        return self._inner.stored(x_BLHD[:, :, own[0] : own[-1] + 1])

    def heads_cached(self, layer: int, heads: int) -> Sequence[int]:
        return self.placements[layer].columns[self._communicator.rank]

    def splits_at(self, chunks: Sequence[Chunk]) -> int:
        return self._inner.splits_at(chunks)

    def attend(self, source: Source, cache: LayerCache, chunks: Sequence[Chunk], operations: PassOperations) -> Tensor:
        batch, frames, own_tokens, _, width = source.shape
        placement = self.placements[cache.index]
        sizes, quantized = [(3, batch, frames, own_tokens, h, width) for h in placement.sizes], cache.quantized
        shapes: Sequence[Shape] = sizes if quantized is None else piece_shapes(sizes, source.like)
        sent = self._communicator.buffer("qkv out", shapes, source.like)
        if quantized is None:
            q, k, v = ([Slots(piece[kind]) for piece in sent] for kind in range(3))
        else:
            q, k, v = self._kept.sent("qkv out", sent, sizes, quantized)
        if placement.in_order:
            operations.norm_rope_store(source, q=q, k=k, v=v, k_offset=cache.k_offset)
        else:
            by_head = placement.by_head
            operations.norm_rope_store(source, q=by_head(q), k=by_head(k), v=by_head(v), k_offset=cache.k_offset)
        heads = placement.sizes[self._communicator.rank]
        sizes = [(3, batch, frames, tokens, heads, width) for tokens in self._tokens]
        shapes = sizes if quantized is None else piece_shapes(sizes, source.like)
        arrived = self._communicator.all_to_all("qkv", cache.index, shapes, sent).wait()
        received: Source = Pieces(arrived)
        if quantized is not None:
            received = self._kept.received("qkv in", arrived, sizes, quantized)
        if self._pipelined:
            output = self._attend_by_groups(received, cache, chunks, operations)
        else:
            attended = self._inner.attend(received, cache, chunks, operations)
            output = torch.cat(self._send_back(attended, placement.sizes, cache.index, operations).wait(), 3)
        return output if placement.in_order else placement.in_model_order(output, 3)

    def _attend_by_groups(
        self, source: Source, cache: LayerCache, chunks: Sequence[Chunk], operations: PassOperations
    ) -> Tensor:
        """Attends group by group of heads and sends each group's output while the next is computed.

        Sending starts with the last chunk. The earlier chunks are attended before it is written, since it may overwrite
        keys that they read.
        """
        by_group = self._heads_by_group[cache.index]
        own = _ranges([heads[self._communicator.rank] for heads in by_group])
        outputs: list[list[Tensor]] = [[] for _ in own]
        handles: list[AsyncHandle] = []
        for chunk, frames in by_chunk(chunks):
            q = write_chunk(source if len(chunks) == 1 else source.part(frames), cache, chunk, operations, None)
            for number, heads in enumerate(own):
                group_q = q[..., heads, :]
                keys = _of_heads(cache.keys(chunk), heads)
                attended = attend_groups(group_q.flatten(1, 2), keys, operations)
                outputs[number].append(attended.view(group_q.shape))
                if chunk == chunks[-1]:
                    whole = joined(outputs[number])
                    sent = self._send_back(whole, by_group[number], cache.index, operations, f" {number}")
                    handles.append(sent)
        received = [handle.wait() for handle in handles]
        return torch.cat([group[rank] for rank in range(self._communicator.size) for group in received], 3)

    def _send_back(
        self, output_BFSHD: Tensor, heads: Sequence[int], layer: int, operations: PassOperations, use: str = ""
    ) -> AsyncHandle:
        """Sends every rank the output of its tokens and receives `heads` of this rank's tokens from each rank."""
        batch, frames, _, own_heads, width = output_BFSHD.shape
        sent = self._communicator.buffer(
            f"output out{use}", [(batch, frames, tokens, own_heads, width) for tokens in self._tokens], output_BFSHD
        )
        operations.split_tokens(output_BFSHD, sent)
        shapes = [(batch, frames, self.tokens, h, width) for h in heads]
        return self._communicator.all_to_all("output", layer, shapes, sent, use)


def _of_heads(groups: Sequence[Keys], heads: slice) -> list[Keys]:
    """The keys of some of a rank's heads, by head group."""
    found, first = [], 0
    for keys in groups:
        count = keys.k.shape[2]
        part = slice(max(heads.start - first, 0), min(heads.stop - first, count))
        if part.start < part.stop:
            found.append(keys.heads(part))
        first += count
    return found


def _split(heads: Sequence[int], groups: int) -> list[list[int]]:
    """Each rank's number of heads split into `groups` parts that differ by at most one."""
    return [shares(h, groups) for h in heads]


def _ranges(sizes: Sequence[int]) -> list[slice]:
    """Consecutive slices of these sizes."""
    ranges, start = [], 0
    for size in sizes:
        ranges.append(slice(start, start + size))
        start += size
    return ranges
