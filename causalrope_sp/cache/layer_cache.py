"""What a layer of the model sees of a KV cache: the slots that it writes and the keys that its queries attend."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from causalrope_kernels import Keys, Slots
from causalrope_sp.grid import Chunk


class SlotCache(Protocol):
    """A cache of all layers, whose slots hold one frame's tokens each."""

    def kv_slots(self, layer: int, chunk: Chunk) -> tuple[Sequence[Slots], Sequence[Slots]]:
        """Returns the slots of a layer that a chunk's keys and values are written to; see `LayerCache.kv_slots`."""

    def keys(self, layer: int, chunk: Chunk, since: int, old: bool, reader: int = 0) -> Sequence[Keys]:
        """Returns the keys and values of a layer that a chunk's queries attend, by head group in order of heads.

        Args:
            layer: the layer.
            chunk: the chunk of the queries; its keys and values are written.
            since: a global time index that splits the frames in two.
            old: whether to return the frames before `since`, or the others.
            reader: whose queries they are, of the ranks that share the tokens, where a rank attends those of all.
        """


class LayerCache:
    """The view of one layer.

    Args:
        cache: the cache of all layers.
        index: the number of the layer.
        quantized: see the attribute.
        k_offset: see the attribute.

    Attributes:
        quantized: the dtype of 8 bits that keys and values are stored in, and sent in; None for that of the model.
        k_offset: what is taken off the keys before they are quantized, (B, N, d) of all heads of the model; None where
            nothing is.
        centre: sets `k_offset` (see `KeyOffsets.set`), as it must be before the first key is quantized; None where
            nothing is taken off, or it is set.
    """

    def __init__(
        self, cache: SlotCache, index: int, quantized: torch.dtype | None = None, k_offset: Tensor | None = None
    ) -> None:
        self._cache, self.index = cache, index
        self.quantized, self.k_offset = quantized, k_offset
        self.centre: Callable[[Tensor], None] | None = None

    def kv_slots(self, chunk: Chunk) -> tuple[Sequence[Slots], Sequence[Slots]]:
        """Returns the slots of the chunk's keys and of its values, by head group. The caller must write them.

        For the open chunk of a `KVCache`, the first call copies the frames that the chunk overwrites to the undo
        buffer.
        """
        return self._cache.kv_slots(self.index, chunk)

    def keys(self, chunk: Chunk, reader: int = 0) -> Sequence[Keys]:
        """Returns all keys and values that the chunk's queries attend, its own included, by head group; see
        `SlotCache`."""
        return self._cache.keys(self.index, chunk, 0, False, reader)

    def keys_before(self, chunk: Chunk, since: int) -> Sequence[Keys]:
        """Returns those of `keys` that belong to frames before the global time index `since`."""
        return self._cache.keys(self.index, chunk, since, old=True)

    def keys_since(self, chunk: Chunk, since: int) -> Sequence[Keys]:
        """Returns those of `keys` that belong to frames from the global time index `since` on."""
        return self._cache.keys(self.index, chunk, since, old=False)
