"""What is taken off the keys of a quantized cache before they are rounded: a mean of the first keys of each head.

Attention does not see what all keys of a query have in common, so nothing is added again when the keys are read.

Shapes: B batch, H heads, d head width.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from causalrope_sp.cache.head_ring import HeadRing
from causalrope_sp.cache.layer_cache import LayerCache


class KeyOffsets:
    """The offsets of all layers of a cache, each set before the first of its keys is written.

    Args:
        rings: the rings of all head groups.
        layers: the views of the layers, which have a `centre` until it was called.
        still: the first channels of a head that keep their mean, since they rotate on read, which would move an offset
            from key to key.
        set_already: the layers whose offset is set.
    """

    def __init__(
        self, rings: Sequence[HeadRing], layers: Sequence[LayerCache], still: int, set_already: frozenset[int]
    ) -> None:
        self._rings, self._still, self._set = rings, still, set(set_already)
        self._layers = [weakref.proxy(layer) for layer in layers]
        self._ask()

    def _ask(self) -> None:
        """Lets the layers whose offset is not set ask for it."""
        for index, layer in enumerate(self._layers):
            if index not in self._set:
                layer.centre = partial(self.set, index)

    @property
    def are_set(self) -> bool:
        """Whether those of all layers are set, or none are taken off."""
        return len(self._set) == len(self._layers)

    def forget(self) -> None:
        """Lets all offsets be set anew, of a cache that holds no keys any more."""
        if self._rings[0].storage[0].offset_BHD is not None:
            self._set.clear()
            self._ask()

    @property
    def set_already(self) -> frozenset[int]:
        """The layers whose offset is set."""
        return frozenset(self._set)

    def set(self, layer: int, mean_BHD: Tensor) -> None:
        """Sets what is taken off all keys that a layer will hold.

        Args:
            layer: the layer; none of its keys is written yet.
            mean_BHD: a mean of keys, the same on all ranks that attend with these heads, which are in the order of
                their rings.
        """
        first = 0
        for ring in self._rings:
            offset_BHD = ring.storage[layer].offset_BHD
            assert offset_BHD is not None, "the cache is quantized"
            heads = slice(first, first + offset_BHD.shape[1])
            offset_BHD[..., self._still :] = mean_BHD[:, heads, self._still :]
            first = heads.stop
        self._set.add(layer)
        self._layers[layer].centre = None

    def read(self) -> Tensor:
        """Returns the offsets, (B, heads, d), with the heads layer by layer; NaN if one is not set yet."""
        layers = zip(*[ring.storage for ring in self._rings], strict=True)
        found = torch.cat([x.offset_BHD for own in layers for x in own if x.offset_BHD is not None], 1)
        return found if self.are_set else found.fill_(torch.nan)
