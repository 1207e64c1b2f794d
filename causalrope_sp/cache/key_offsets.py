"""What is taken off the keys of a quantized cache before they are rounded: a mean of the first keys of each head.

Attention does not see what all keys of a query have in common, so nothing is added again when the keys are read.

Shapes: L layers, B batch, N heads of the model, d head width.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from causalrope_sp.cache.layer_cache import LayerCache


class KeyOffsets:
    """The offsets of all layers of a cache, each set before the first of its keys is quantized.

    Args:
        offsets_LBND: their memory, of all heads of the model, since a rank may quantize what others store; None where
            nothing is taken off.
        layers: the views of the layers, which have a `centre` until it was called.
        still: the first channels of a head that keep their mean, since they rotate on read, which would move an offset
            from key to key.
        set_already: the layers whose offset is set.
    """

    def __init__(
        self, offsets_LBND: Tensor | None, layers: Sequence[LayerCache], still: int, set_already: frozenset[int]
    ) -> None:
        self._offsets, self._still, self._set = offsets_LBND, still, set(set_already)
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
        if self._offsets is not None:
            self._set.clear()
            self._ask()

    @property
    def set_already(self) -> frozenset[int]:
        """The layers whose offset is set."""
        return frozenset(self._set)

    def set(self, layer: int, mean_BND: Tensor) -> None:
        """Sets what is taken off all keys that a layer will hold.

        Args:
            layer: the layer; none of its keys is quantized yet.
            mean_BND: a mean of keys, the same on all ranks, with the heads in the order of the model.
        """
        assert self._offsets is not None, "the cache is quantized"
        self._offsets[layer][..., self._still :] = mean_BND[..., self._still :]
        self._set.add(layer)
        self._layers[layer].centre = None

    def read(self) -> Tensor | None:
        """Returns the offsets, (L, B, N, d); NaN if one is not set yet, and None where nothing is taken off."""
        if self._offsets is None or self.are_set:
            return self._offsets
        return torch.full_like(self._offsets, torch.nan)
