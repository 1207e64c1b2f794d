"""The memory of a KV cache, cut into the storage of every ring and layer.

Shapes: L layers, B batch, K slots, S tokens of a frame, H heads of a ring in a layer, N all heads, d head width.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from math import prod

import torch
from torch import Tensor

from causalrope_kernels.quantized_heads import SCALE_DTYPE
from causalrope_sp.cache.layer_storage import LayerStorage
from causalrope_sp.heads.cached_heads import CachedHeads
from causalrope_sp.heads.policy import SKIP

Shape = tuple[int, ...]


class CacheStorage:
    """One memory for all rings, so that their distances are the same in every stream of a size.

    Args:
        cached: the rings, and how many heads of every layer each has.
        sizes: B, S as this rank stores them, and d.
        dtype: in which keys and values are computed.
        quantized: the dtype of 8 bits that they are stored in; None stores them as they are computed.
        device: where they live.
        heads: N, the heads of the model.

    Attributes:
        slots: K, by ring.
        quantized: the dtype of 8 bits, or None.
        offsets_LBND: what is taken off the keys of each layer before they are quantized, in float32 or wider.
    """

    def __init__(
        self,
        cached: CachedHeads,
        sizes: tuple[int, int, int],
        dtype: torch.dtype,
        quantized: torch.dtype | None,
        device: torch.device | str,
        heads: int,
    ) -> None:
        batch, tokens, width = sizes
        self._attended = [frames != SKIP for frames in cached.frames]
        self.slots = [frames or cached.scratch for frames in cached.frames]
        self._shapes = [
            [(2, batch, slots, tokens, heads, width) for slots, heads in zip(self.slots, counts, strict=True)]
            for counts in cached.heads
        ]
        self._numbers = torch.empty(self._size(1), dtype=quantized or dtype, device=device)
        self._scales: Tensor | None = None
        self.quantized = quantized
        self.offsets_LBND: Tensor | None = None
        if quantized is not None:
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            self._scales = torch.empty(self._size(width), dtype=SCALE_DTYPE, device=device)
            self.offsets_LBND = torch.zeros(self.layers, batch, heads, width, dtype=wide, device=device)

    @property
    def layers(self) -> int:
        """How many layers there are."""
        return len(self._shapes)

    def tensors(self) -> Iterator[Tensor]:
        """Yields all memory of the storage."""
        yield from (x for x in (self._numbers, self._scales, self.offsets_LBND) if x is not None)

    def copy(self) -> CacheStorage:
        """Returns a copy of all that lies in slots, cut alike."""
        other = copy.copy(self)
        other._numbers = self._numbers.clone()
        other._scales = None if self._scales is None else self._scales.clone()
        return other

    def shared(self) -> CacheStorage:
        """Returns the same storage for a fork; the offsets are its own, since they may be set before anything is
        stored."""
        other = copy.copy(self)
        other.offsets_LBND = None if self.offsets_LBND is None else self.offsets_LBND.clone()
        return other

    def by_ring(self) -> list[list[LayerStorage]]:
        """Returns the storage by ring and layer. H is 0 in a layer without heads of a ring, and all layers share the
        last part of the memory for heads that attend nothing."""
        found: list[list[LayerStorage]] = [[] for _ in self._attended]
        scratch = self._kept()
        first = 0
        for by_ring in self._shapes:
            for storage, shape, own in zip(found, by_ring, self._attended, strict=True):
                begin, width = first if own else scratch, shape[-1]
                numbers = self._numbers[begin : begin + prod(shape)].view(shape)
                scales = None
                if self._scales is not None:
                    scales = self._scales[begin // width : (begin + prod(shape)) // width].view(shape[:-1])
                storage.append(LayerStorage(numbers, scales))
                first += prod(shape) if own else 0
        return found

    def _size(self, divisor: int) -> int:
        """The numbers in all slots, divided."""
        every = [(prod(s), own) for by_ring in self._shapes for s, own in zip(by_ring, self._attended, strict=True)]
        return (self._kept() + max((size for size, own in every if not own), default=0)) // divisor

    def _kept(self) -> int:
        """The numbers in the slots of heads that attend something."""
        return sum(prod(s) for by_ring in self._shapes for s, own in zip(by_ring, self._attended, strict=True) if own)
