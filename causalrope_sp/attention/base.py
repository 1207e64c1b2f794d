"""How self-attention crosses ranks. The base class is the group of one, where nothing crosses.

A strategy has q, k and v written straight to where it wants them, normed and rotated by their global index: into what
it sends, or into the slots of the cache. What it caches, and in which split, is its own business.

Shapes: B batch, F frames of the pass, s tokens of a frame on this rank, S tokens of a whole frame, H heads, h heads on
this rank, d head width, L keys.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from causalrope_kernels import Keys, Partial, Slots, Source, attention, attention_parts, norm_rope_store
from causalrope_sp.cache.kv_cache import LayerCache
from causalrope_sp.grid import Chunk


class Strategy:
    """Attention within one process.

    Args:
        tokens: s, how many tokens of a frame this rank brings.
        heads: h, of how many heads.
        backend: of attention, one of `causalrope_kernels.ATTENTION_BACKENDS`.
    """

    def __init__(self, tokens: int, heads: int, backend: str = "auto") -> None:
        self.tokens, self.heads, self.backend = tokens, heads, backend

    @property
    def stored_tokens(self) -> int:
        """How many tokens of a frame this rank caches,"""
        return self.tokens

    @property
    def stored_heads(self) -> int:
        """and how many heads of them."""
        return self.heads

    def stored(self, x_BLHD: Tensor) -> Tensor:
        """Of keys or values that every rank has whole, those that this one stores; each is stored once for a query."""
        return x_BLHD

    def attend(self, source: Source, cache: LayerCache, chunks: Sequence[Chunk]) -> Tensor:
        """What this rank's queries attend, (B, F, s, h, d). `chunks` follow one another in the frames."""
        return joined(attend_cached(source, cache, chunks, self.backend))


def attend_cached(source: Source, cache: LayerCache, chunks: Sequence[Chunk], backend: str) -> list[Tensor]:
    """Chunk after chunk: its keys and values go into the cache, then its queries attend all that they may see.

    The order matters: a later chunk may take over slots that an earlier one still reads.
    """
    outputs = []
    for chunk, frames in by_chunk(chunks):
        q = write_chunk(source.part(frames), cache, chunk)
        outputs.append(attention(q.flatten(1, 2), cache.keys(chunk), backend).view(q.shape))
    return outputs


def write_chunk(source: Source, cache: LayerCache, chunk: Chunk) -> Tensor:
    """A chunk's keys and values into the cache; its queries, (B, F, s, h, d)."""
    q = empty(source)
    k_slots, v_slots = cache.kv_slots(chunk)
    norm_rope_store(source, q=[Slots(q)], k=[k_slots], v=[v_slots])
    return q


def empty(source: Source) -> Tensor:
    """Room for one of q, k, v."""
    return source.like.new_empty(source.shape)


def joined(outputs: Sequence[Tensor]) -> Tensor:
    """One after the other in time."""
    return outputs[0] if len(outputs) == 1 else torch.cat(tuple(outputs), 1)


def by_chunk(chunks: Sequence[Chunk]) -> list[tuple[Chunk, slice]]:
    """Every chunk with its frames' place in the pass."""
    first = chunks[0].start
    return [(chunk, slice(chunk.start - first, chunk.stop - first)) for chunk in chunks]


def parts_of(q_BFQHD: Tensor, keys: Keys, backend: str) -> list[Partial]:
    """Partial attention of queries frame by frame, over parts of the keys, (B, F·Q, h, d)."""
    return attention_parts(q_BFQHD.flatten(1, 2), keys, backend)


def lse_elements(itemsize: int) -> int:
    """How many numbers of `itemsize` bytes a log-sum-exp takes on the wire: it travels in float32 at least."""
    return max(1, 4 // itemsize)
