"""How self-attention crosses ranks. The base class is the group of one, where nothing crosses.

A strategy says where this rank's q, k and v are to be written (`place`), normed and rotated by their global index,
and returns what its queries attend (`attend`). What it caches, and in which split, is its own business.

Shapes: B batch, F frames of the pass, s tokens of a frame on this rank, S tokens of a whole frame, H heads, h heads on
this rank, d head width, L keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from causalrope_kernels import Placement, attention, attention_lse, merge
from causalrope_sp.cache import LayerCache
from causalrope_sp.grid import Chunk

Partial = tuple[Tensor, Tensor]  # attention over some of the keys, (B, F, s, h, d), and its log-sum-exp, (B, F, s, h)


@dataclass(frozen=True)
class Placed:
    """q, k, v of one pass, each (B, F, s, h, d), where a strategy wants them: of some heads each, in order.

    `sent` is the buffer that they are a part of, if they are to be sent, piece by piece.
    """

    pieces: Sequence[tuple[Tensor, Tensor, Tensor]]
    sent: Sequence[Tensor] = ()

    def placements(self) -> list[Placement]:
        """The same views as the projection writes them, (B, F·s, h, d)."""
        placements, start = [], 0
        for piece in self.pieces:
            stop = start + piece[0].shape[3]
            placements.append(Placement(start, stop, *(x.flatten(1, 2) for x in piece)))
            start = stop
        return placements


class Strategy:
    """Attention within one process.

    Args:
        tokens: s, how many tokens of a frame this rank brings.
        heads: h, of how many heads.
    """

    def __init__(self, tokens: int, heads: int) -> None:
        self.tokens, self.heads = tokens, heads

    @property
    def stored_tokens(self) -> int:
        """How many tokens of a frame this rank caches,"""
        return self.tokens

    @property
    def stored_heads(self) -> int:
        """and how many heads of them."""
        return self.heads

    def place(self, batch: int, frames: int, like: Tensor) -> Placed:
        """Room for a pass; `like` has the numbers' type and device, and d as its last axis."""
        room = like.new_empty(3, batch, frames, self.tokens, self.heads, like.shape[-1])
        return Placed([tuple(room)])

    def attend(self, placed: Placed, cache: LayerCache, chunks: Sequence[Chunk]) -> Tensor:
        """What this rank's queries attend, (B, F, s, h, d). `chunks` follow one another in the frames."""
        ((q, k, v),) = placed.pieces
        return attend_local(q, k, v, cache, chunks)


def attend_local(
    q_BFQHD: Tensor,
    k_BFSHD: Tensor,
    v_BFSHD: Tensor,
    cache: LayerCache,
    chunks: Sequence[Chunk],
    heads: slice = slice(None),
) -> Tensor:
    """Chunk after chunk: write its keys and values, then attend all that it may see, (B, F, Q, h, d).

    The order matters: a later chunk may take over slots that an earlier one still reads.
    """
    outputs = []
    for chunk, frames in by_chunk(chunks):
        cache.write(chunk, k_BFSHD[:, frames], v_BFSHD[:, frames], heads=heads)
        q = q_BFQHD[:, frames]
        k, v = cache.read(chunk)
        outputs.append(attention(q.flatten(1, 2), k[:, :, heads], v[:, :, heads]).view(q.shape))
    return torch.cat(outputs, 1)


def by_chunk(chunks: Sequence[Chunk]) -> list[tuple[Chunk, slice]]:
    """Every chunk with its frames' place in the pass."""
    first = chunks[0].start
    return [(chunk, slice(chunk.start - first, chunk.stop - first)) for chunk in chunks]


def attend_all(q_BFQHD: Tensor, cache: LayerCache, chunk: Chunk) -> Partial:
    """Attention over all that the chunk's queries see of what this rank holds, with its log-sum-exp."""
    return attend_stretches(q_BFQHD, cache, [(0, cache.window.readable(chunk))])[0]


def lse_elements(itemsize: int) -> int:
    """How many numbers of `itemsize` bytes a log-sum-exp takes on the wire: it travels in float32 at least."""
    return max(1, 4 // itemsize)


def attend_stretches(q_BFQHD: Tensor, cache: LayerCache, stretches: Sequence[tuple[int, int]]) -> list[Partial]:
    """Partial attention over each stretch of slots."""
    partials = []
    for first, stop in stretches:
        output, lse = attention_lse(q_BFQHD.flatten(1, 2), *cache.slots(first, stop))
        partials.append((output.view(q_BFQHD.shape), lse.view(q_BFQHD.shape[:-1])))
    return partials


def merged(partials: Sequence[Partial]) -> Partial:
    """The partial attention over all the keys of some, which have none in common."""
    return partials[0] if len(partials) == 1 else merge(*zip(*partials, strict=True))
