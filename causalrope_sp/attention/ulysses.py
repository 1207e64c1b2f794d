"""Ulysses (arXiv 2309.14509): trade tokens for heads, attend, trade back.

Two collectives a layer: q, k, v packed on the way in, the output on the way back. Heads need not divide evenly. Inside
a head group another strategy may go on sharing tokens; then this is the outer half of a product.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from causalrope_kernels import Pieces, Slots, Source, attention, norm_rope_store, split_tokens
from causalrope_sp.attention.base import Strategy, by_chunk, joined, write_chunk
from causalrope_sp.cache.kv_cache import LayerCache
from causalrope_sp.distributed.communicator import AsyncHandle, Communicator
from causalrope_sp.grid import Chunk, shares


class Ulysses(Strategy):
    """
    Args:
        exchange: the ranks that trade.
        tokens: of a frame, rank by rank.
        heads: of the model, rank by rank.
        inner: how the tokens of all these ranks are attended, for this rank's heads.
        head_groups: send a group's output while the next is computed (PipeSP, arXiv 2511.12056); 1 sends all at once.
    """

    def __init__(
        self,
        communicator: Communicator,
        tokens: Sequence[int],
        heads: Sequence[int],
        inner: Strategy,
        head_groups: int = 1,
    ) -> None:
        super().__init__(tokens[communicator.rank], sum(heads), inner.backend)
        self._communicator, self._tokens, self._heads, self._inner = communicator, tokens, heads, inner
        mine = heads[communicator.rank]
        self._groups = _split([mine], head_groups)[0]
        self._arriving = list(zip(*_split(heads, head_groups), strict=True))  # group by group, rank by rank
        self._pipelined = head_groups > 1

    @property
    def stored_tokens(self) -> int:
        return self._inner.stored_tokens

    @property
    def stored_heads(self) -> int:
        return self._inner.stored_heads

    def stored(self, x_BLHD: Tensor) -> Tensor:
        return self._inner.stored(x_BLHD[:, :, _ranges(self._heads)[self._communicator.rank]])

    def attend(self, source: Source, cache: LayerCache, chunks: Sequence[Chunk]) -> Tensor:
        batch, frames, mine, _, width = source.shape
        sent = self._communicator.buffer(
            "qkv out", [(3, batch, frames, mine, h, width) for h in self._heads], source.like
        )
        q, k, v = ([Slots(piece[kind]) for piece in sent] for kind in range(3))
        norm_rope_store(source, q=q, k=k, v=v)
        heads = self._heads[self._communicator.rank]
        shapes = [(3, batch, frames, tokens, heads, width) for tokens in self._tokens]
        arrived = Pieces(self._communicator.all_to_all("qkv", cache.index, shapes, sent).wait())
        if self._pipelined:
            return self._attend_by_groups(arrived, cache, chunks)
        output = self._inner.attend(arrived, cache, chunks)
        return torch.cat(self._send_back(output, self._heads, cache.index, "").wait(), 3)

    def _attend_by_groups(self, source: Source, cache: LayerCache, chunks: Sequence[Chunk]) -> Tensor:
        """Only the last chunk's attention is sent group by group: the others' keys may be gone once it is written."""
        outputs: list[list[Tensor]] = [[] for _ in self._groups]
        handle: list[AsyncHandle] = []
        for chunk, frames in by_chunk(chunks):
            q = write_chunk(source.part(frames), cache, chunk)
            for number, heads in enumerate(_ranges(self._groups)):
                mine = q[..., heads, :]
                found = attention(mine.flatten(1, 2), cache.keys(chunk).heads(heads), self.backend)
                outputs[number].append(found.view(mine.shape))
                if chunk == chunks[-1]:
                    whole = joined(outputs[number])
                    handle.append(self._send_back(whole, self._arriving[number], cache.index, f" {number}"))
        by_group = [handle.wait() for handle in handle]
        return torch.cat([group[rank] for rank in range(self._communicator.size) for group in by_group], 3)

    def _send_back(self, output_BFSHD: Tensor, heads: Sequence[int], layer: int, use: str) -> AsyncHandle:
        """Every rank's tokens to that rank; `heads` of this rank's tokens come back from the ranks."""
        batch, frames, _, mine, width = output_BFSHD.shape
        sent = self._communicator.buffer(
            f"output out{use}", [(batch, frames, tokens, mine, width) for tokens in self._tokens], output_BFSHD
        )
        split_tokens(output_BFSHD, sent)
        shapes = [(batch, frames, self.tokens, h, width) for h in heads]
        return self._communicator.all_to_all("output", layer, shapes, sent, use)


def _split(heads: Sequence[int], groups: int) -> list[list[int]]:
    """Each rank's heads in `groups` parts that differ by at most one."""
    return [shares(h, groups) for h in heads]


def _ranges(sizes: Sequence[int]) -> list[slice]:
    ranges, start = [], 0
    for size in sizes:
        ranges.append(slice(start, start + size))
        start += size
    return ranges
