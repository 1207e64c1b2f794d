"""Rotary tables of the three axes. A position comes in as an argument; a rank is never seen here.

Wan splits the d/2 channel pairs of a head into time, height and width (DESIGN: d//2 - 2·(d//6), d//6, d//6) and
gives each axis its own frequencies theta^(-2i/n), n the axis' width in channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from causalrope_sp.devices import send
from causalrope_sp.grid import Shard


@dataclass(frozen=True)
class Rotation:
    """Cosine and sine of every token's angles, each (T, d/2), ready for `causalrope_kernels.rotate`."""

    cos: Tensor
    sin: Tensor


class RotaryTables:
    """Angles by axis, built in float64. The time axis is unbounded: its table doubles when a stream outgrows it."""

    def __init__(self, head_dim: int, theta: float, shard: Shard, device: torch.device, dtype: torch.dtype) -> None:
        spatial = head_dim // 6
        self._time_frequencies = _frequencies(head_dim // 2 - 2 * spatial, theta)
        y, x = shard.rows_and_columns()
        frequencies = _frequencies(spatial, theta)
        self._place_angles = torch.cat([torch.outer(y.double(), frequencies), torch.outer(x.double(), frequencies)], 1)
        self._device, self._dtype = device, dtype
        self._place = self._table(self._place_angles)
        self._time = self._table(torch.zeros(0, len(self._time_frequencies)))

    def rotation(self, frames: Sequence[int]) -> Rotation:
        """The rotation of this shard's tokens in the frames with these global time indices, frame after frame."""
        self._grow(max(frames) + 1)
        index = send(torch.tensor(frames), self._device)
        tokens = self._place.cos.shape[0]

        def join(time: Tensor, place: Tensor) -> Tensor:
            time = time[index].unsqueeze(1).expand(-1, tokens, -1)
            return torch.cat([time, place.expand(len(frames), -1, -1)], -1).flatten(0, 1)

        return Rotation(join(self._time.cos, self._place.cos), join(self._time.sin, self._place.sin))

    def _grow(self, frames: int) -> None:
        have = self._time.cos.shape[0]
        if frames > have:
            steps = torch.arange(max(frames, 2 * have, 64), dtype=torch.float64)
            self._time = self._table(torch.outer(steps, self._time_frequencies))

    def _table(self, angles: Tensor) -> Rotation:
        return Rotation(*(a.to(self._device, self._dtype) for a in (angles.cos(), angles.sin())))


def _frequencies(pairs: int, theta: float) -> Tensor:
    return theta ** (-torch.arange(pairs, dtype=torch.float64) / pairs)
