"""What a chunk attends, layer by layer: the global tokens, the given frames, and its own frames.

The rows of a layer, in slots of a frame's tokens as in any `KVCache`, so that every strategy writes and reads it:

    [ padding to whole slots | global tokens | given frames | the frames of the chunk at hand ]

Chunks are attended one after the other and take turns in the last part; all that one attends is a single stretch.

Shapes: B batch, G global tokens, H heads, d head width, as the strategy stores them on this rank.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from causalrope_kernels import Keys, Slots
from causalrope_sp.attention.base import Strategy
from causalrope_sp.cache.kv_cache import KVCache
from causalrope_sp.cache.window import SlidingWindow
from causalrope_sp.devices import send
from causalrope_sp.grid import Chunk

GIVEN = 0  # the number of the given frames among the chunks of a pass; those of the video follow


def in_pass(chunks: Sequence[Chunk]) -> list[Chunk]:
    """The chunks of the video as a pass has them: one after the other, what two of them share there twice."""
    passed, start = [], 1  # 0 is where strategies find nothing from before to attend, as for the given frames
    for chunk in chunks:
        passed.append(Chunk(GIVEN + 1 + chunk.index, start, chunk.frames))
        start += chunk.frames
    return passed


class ChunkCache(KVCache):
    """
    Args:
        strategy: how the lane attends, which says what of all this a rank stores.
        global_tokens: G, 0 for none.
        given: frames that every chunk sees.
        longest: frames of the longest chunk.
    """

    def __init__(
        self,
        layers: int,
        batch: int,
        strategy: Strategy,
        global_tokens: int,
        given: int,
        longest: int,
        head_dim: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        tokens, heads = strategy.stored_tokens, strategy.stored_heads
        self._strategy, self._given = strategy, given
        self._globals = strategy.stored(torch.empty(1, global_tokens, strategy.heads, 1)).shape[1]
        self._before = -(-self._globals // tokens)
        window = SlidingWindow(self._before + given + longest)
        super().__init__(layers, batch, window, tokens, heads, head_dim, dtype=dtype, device=device)

    def write_globals(self, found: Sequence[Keys]) -> None:
        """The global tokens' keys and values, (B, G, H, d) with all heads, layer by layer."""
        stop = self._before * self.storage_L2BKSHD.shape[4]
        for ring_2BKSHD, keys in zip(self.storage_L2BKSHD, found, strict=True):
            for ring, value in zip(ring_2BKSHD, (keys.k, keys.v), strict=True):
                ring.flatten(1, 2)[:, stop - self._globals : stop] = self._strategy.stored(value)

    def kv_slots(self, layer: int, chunk: Chunk) -> tuple[Slots, Slots]:
        ring_2BKSHD = self.storage_L2BKSHD[layer]
        if chunk not in self._slots:
            first = self._before + (0 if chunk.index == GIVEN else self._given)
            self._slots[chunk] = send(torch.arange(first, first + chunk.frames), ring_2BKSHD.device)
        k, v = (Slots(ring, self._slots[chunk]) for ring in ring_2BKSHD)
        return k, v

    def keys(self, layer: int, chunk: Chunk, since: int, old: bool) -> Keys:
        """Old is what no chunk of the pass writes: global tokens and given frames."""
        ring_2BKSHD = self.storage_L2BKSHD[layer]
        key = chunk, since, old
        if key not in self._ranges_by_chunk:
            tokens = ring_2BKSHD.shape[3]
            begin, own = self._before * tokens - self._globals, (self._before + self._given) * tokens
            row = (own if since and not old else begin), own if old else own + chunk.frames * tokens
            if chunk.index == GIVEN:  # written before there are global tokens
                row = self._before * tokens, own
            self._ranges_by_chunk[key] = (row,), send(torch.tensor([row], dtype=torch.int32), ring_2BKSHD.device)
        k, v = ring_2BKSHD.flatten(2, 3)
        return Keys(k, v, *self._ranges_by_chunk[key])
