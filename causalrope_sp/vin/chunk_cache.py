"""The KV cache of parallel chunks: global tokens, initial frames and a chunk's own frames, layer by layer.

The rows of a layer lie in slots of one frame's tokens, as in a `KVCache`, so that every strategy writes and reads it:

    [ padding to whole slots | global tokens | initial frames | the frames of the current chunk ]

Chunks are attended one after the other and reuse the last part; the rows that one chunk attends are one range.

Shapes: B batch, G global tokens, H heads, d head width, as the strategy stores them on this rank.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from causalrope_kernels import Keys, Slots
from causalrope_sp.attention.base import Strategy
from causalrope_sp.cache.layer_cache import LayerCache
from causalrope_sp.devices import send
from causalrope_sp.grid import Chunk

INITIAL = 0  # the chunk number of the initial frames in a pass; the chunks of the video follow


def in_pass(chunks: Sequence[Chunk]) -> list[Chunk]:
    """Renumbers the chunks of a video for a pass: they lie one after the other, and each holds its overlap itself."""
    passed, start = [], 1  # start 0 would tell the strategies that there are no earlier keys, as for the initial frames
    for chunk in chunks:
        passed.append(Chunk(INITIAL + 1 + chunk.index, start, chunk.frames))
        start += chunk.frames
    return passed


class ChunkCache:
    """A cache whose slots hold global tokens, the initial frames and one chunk; the chunks are attended in any order.

    Args:
        layers: layers of the DiT.
        batch: B.
        strategy: how the ranks of the `sp` axis attend, which decides what a rank stores.
        global_tokens: G, 0 for none.
        initial_frames: latent frames before the video that every chunk attends.
        longest: latent frames of the longest chunk.
        head_dim: d.
        dtype: of the stored keys and values.
        device: where they are stored.

    Attributes:
        attends_globals: whether the chunks of a pass attend the global tokens; initial frames never do.
    """

    def __init__(
        self,
        layers: int,
        batch: int,
        strategy: Strategy,
        global_tokens: int,
        initial_frames: int,
        longest: int,
        head_dim: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        tokens, heads = strategy.stored_tokens, strategy.stored_heads
        self._strategy, self._initial_frames = strategy, initial_frames
        self._globals = strategy.stored(torch.empty(1, global_tokens, strategy.heads, 1)).shape[1]
        self._before = -(-self._globals // tokens)
        slots = self._before + initial_frames + longest
        shape = (layers, 2, batch, slots, tokens, heads, head_dim)
        self.storage_L2BKSHD = torch.empty(shape, dtype=dtype, device=device)
        self._slots: dict[Chunk, torch.Tensor] = {}  # on the device; all layers share what is made once per chunk
        self.attends_globals = True
        self._ranges: dict[tuple[Chunk, int, bool, bool], tuple[tuple[tuple[int, int], ...], torch.Tensor]] = {}

    def layer(self, index: int) -> LayerCache:
        """Returns the view of one layer."""
        return LayerCache(self, index)

    def write_globals(self, found: Sequence[Keys]) -> None:
        """Writes the global tokens' keys and values.

        Args:
            found: (B, G, H, d) with all heads, layer by layer.
        """
        stop = self._before * self.storage_L2BKSHD.shape[4]
        for ring_2BKSHD, keys in zip(self.storage_L2BKSHD, found, strict=True):
            for ring, value in zip(ring_2BKSHD, (keys.k, keys.v), strict=True):
                ring.flatten(1, 2)[:, stop - self._globals : stop] = self._strategy.stored(value)

    def kv_slots(self, layer: int, chunk: Chunk) -> tuple[Sequence[Slots], Sequence[Slots]]:
        """Returns the slots that the keys and the values of a chunk are written to."""
        ring_2BKSHD = self.storage_L2BKSHD[layer]
        if chunk not in self._slots:
            first = self._before + (0 if chunk.index == INITIAL else self._initial_frames)
            self._slots[chunk] = send(torch.arange(first, first + chunk.frames), ring_2BKSHD.device)
        k, v = (Slots(ring, self._slots[chunk]) for ring in ring_2BKSHD)
        return [k], [v]

    def keys(self, layer: int, chunk: Chunk, since: int, old: bool, reader: int = 0) -> Sequence[Keys]:
        """Returns the keys that a chunk attends, the same for all readers; `old` ones are those that no chunk of the
        pass writes: the global tokens and the initial frames."""
        ring_2BKSHD = self.storage_L2BKSHD[layer]
        key = chunk, since, old, self.attends_globals
        if key not in self._ranges:
            tokens = ring_2BKSHD.shape[3]
            attended = self._globals if self.attends_globals else 0
            begin, own = self._before * tokens - attended, (self._before + self._initial_frames) * tokens
            row = (own if since and not old else begin), own if old else own + chunk.frames * tokens
            if chunk.index == INITIAL:  # written before there are global tokens
                row = self._before * tokens, own
            self._ranges[key] = (row,), send(torch.tensor([row], dtype=torch.int32), ring_2BKSHD.device)
        k, v = ring_2BKSHD.flatten(2, 3)
        return [Keys(k, v, *self._ranges[key])]
