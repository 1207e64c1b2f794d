"""A decoder of two-dimensional convolutions for one spatial shard of the picture: the same layers and weights, whose
convolutions take the edges of the neighbouring shards by halo exchange, and zeros at the picture's border.

A 3×3 convolution reads one row or column beyond its shard. Pointwise convolutions and nearest upsampling read nothing
beyond it.
"""

from __future__ import annotations

import copy
from itertools import chain
from typing import Any

from torch import Tensor, nn

from causalrope_sp.distributed.halo import SpatialShards


def sharing_weights(module: nn.Module) -> Any:
    """Copies a module's layers, so that they can be changed; the copy shares the parameters and buffers."""
    return copy.deepcopy(module, {id(x): x for x in chain(module.parameters(), module.buffers())})


def split_convolutions(module: nn.Module, spatial_shards: SpatialShards) -> None:
    """Makes every convolution of a module read the edges of the neighbouring shards, in place.

    Args:
        module: a decoder whose convolutions have stride 1 along the sharded axis.
        spatial_shards: how ranks share a picture; its collectives run in each forward.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d) and layer.kernel_size[spatial_shards.axis] > 1:
            reach = layer.kernel_size[spatial_shards.axis] // 2
            assert layer.stride[spatial_shards.axis] == 1, "a decoder only ever grows a picture"
            assert not isinstance(layer.padding, str)
            around = list(layer.padding)
            around[spatial_shards.axis] = 0
            layer.padding = tuple(around)
            layer.register_forward_pre_hook(_Widen(spatial_shards, reach))


class _Widen:
    """A hook that adds the halo to a convolution's input."""

    def __init__(self, spatial_shards: SpatialShards, reach: int) -> None:
        self._spatial_shards, self._reach = spatial_shards, reach

    def __call__(self, layer: nn.Module, inputs: tuple[Tensor]) -> Tensor:
        return self._spatial_shards.with_halo(inputs[0], self._reach)
