"""A decoder that makes one strip of the picture: the same layers and weights, whose convolutions see their neighbours'
edges where the whole picture's would see on, and zeros where it ends.

Convolutions of 3×3 reach one row or column beyond a strip; pointwise ones, norms over channels, nearest upsampling and
convolutions in time reach nowhere.
"""

from __future__ import annotations

import copy
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from causalrope_sp.distributed.halo import SpatialShards


def sharing_weights(module: nn.Module) -> Any:
    """A copy whose layers may be changed and whose parameters and buffers are the module's own."""
    return copy.deepcopy(module, {id(x): x for x in chain(module.parameters(), module.buffers())})


def split_convolutions(module: nn.Module, spatial_shards: SpatialShards) -> None:
    """Has every convolution within a module take its input's edges from the neighbours, in place."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.Conv3d) and layer.kernel_size[spatial_shards.axis] > 1:
            reach = layer.kernel_size[spatial_shards.axis] // 2
            assert layer.stride[spatial_shards.axis] == 1, "a decoder only ever grows a picture"
            _drop_padding(layer, spatial_shards.axis)
            layer.register_forward_pre_hook(_Widen(spatial_shards, reach))


class _Widen:
    """Before a convolution: its input, and what it keeps of earlier frames, with the neighbours' edges."""

    def __init__(self, spatial_shards: SpatialShards, reach: int) -> None:
        self._spatial_shards, self._reach = spatial_shards, reach

    def __call__(self, layer: nn.Module, inputs: tuple[Tensor | None, ...]) -> tuple[Tensor, ...]:
        given = [x for x in inputs if x is not None]
        if len(given) == 1:
            return (self._spatial_shards.with_halo(given[0], self._reach),)
        whole = self._spatial_shards.with_halo(torch.cat(given, 2), self._reach)  # one exchange for both
        return whole.split([x.shape[2] for x in given], 2)


def _drop_padding(layer: nn.Conv2d | nn.Conv3d, axis: int) -> None:
    """diffusers' causal convolution pads by hand, by a tuple of its own that begins with the last axis."""
    by_hand: Any = getattr(layer, "_padding", None)
    if by_hand is not None:
        first = 2 * (-1 - axis)
        layer._padding = (*by_hand[:first], 0, 0, *by_hand[first + 2 :])  # type: ignore[assignment]
        return
    assert not isinstance(layer.padding, str)
    around = list(layer.padding)
    around[axis] = 0
    layer.padding = tuple(around)
