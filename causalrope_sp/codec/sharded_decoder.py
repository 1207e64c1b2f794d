"""A decoder for one spatial shard of the picture: the same layers and weights, whose convolutions take the edges of
the neighbouring shards by halo exchange, and zeros at the picture's border.

A 3×3 convolution reads one row or column beyond its shard. Pointwise convolutions, norms over channels, nearest
upsampling and convolutions in time read nothing beyond it.
"""

from __future__ import annotations

import copy
from itertools import chain
from typing import Any

import torch
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
        if isinstance(layer, nn.Conv2d | nn.Conv3d) and layer.kernel_size[spatial_shards.axis] > 1:
            reach = layer.kernel_size[spatial_shards.axis] // 2
            assert layer.stride[spatial_shards.axis] == 1, "a decoder only ever grows a picture"
            _drop_padding(layer, spatial_shards.axis)
            layer.register_forward_pre_hook(_Widen(spatial_shards, reach))


class _Widen:
    """A hook that adds the halo to a convolution's input, and to the earlier frames that it keeps."""

    def __init__(self, spatial_shards: SpatialShards, reach: int) -> None:
        self._spatial_shards, self._reach = spatial_shards, reach

    def __call__(self, layer: nn.Module, inputs: tuple[Tensor | None, ...]) -> tuple[Tensor, ...]:
        present = [x for x in inputs if x is not None]
        if len(present) == 1:
            return (self._spatial_shards.with_halo(present[0], self._reach),)
        whole = self._spatial_shards.with_halo(torch.cat(present, 2), self._reach)  # one halo exchange for both
        return whole.split([x.shape[2] for x in present], 2)


def _drop_padding(layer: nn.Conv2d | nn.Conv3d, axis: int) -> None:
    """Removes a convolution's padding along an axis; diffusers' causal one has its own tuple, last axis first."""
    own: Any = getattr(layer, "_padding", None)
    if own is not None:
        first = 2 * (-1 - axis)
        layer._padding = (*own[:first], 0, 0, *own[first + 2 :])  # type: ignore[assignment]
        return
    assert not isinstance(layer.padding, str)
    around = list(layer.padding)
    around[axis] = 0
    layer.padding = tuple(around)
