"""Rotary tables of the three axes. A position comes in as an argument; a rank is never seen here.

Wan splits the d/2 channel pairs of a head into time, height and width (DESIGN: d//2 - 2·(d//6), d//6, d//6) and
gives each axis its own frequencies theta^(-2i/n), n the axis' width in channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from causalrope_kernels import RotateOnRead, Rotation
from causalrope_sp.devices import send
from causalrope_sp.grid import Shard

FIRST_TIMES = 1024  # rows of the time axis' table to begin with


class RotaryTables:
    """Angles by axis, built in float64. The time axis is unbounded: its table doubles when a stream outgrows it."""

    def __init__(self, head_dim: int, theta: float, shard: Shard, device: torch.device, dtype: torch.dtype) -> None:
        spatial = head_dim // 6
        self._shard, self._device, self._dtype = shard, device, dtype
        self._time_frequencies = _frequencies(head_dim // 2 - 2 * spatial, theta)
        self._row = self._table(shard.grid.rows, _frequencies(spatial, theta))
        self._column = self._table(shard.grid.columns, _frequencies(spatial, theta))
        self._time = self._table(FIRST_TIMES, self._time_frequencies)

    def rotation(self, query_times: Sequence[int], key_times: Sequence[int] | None = None) -> Rotation:
        """The rotation of this shard's tokens in frames whose queries and keys stand at these places in time.

        Keys stand where queries do if nothing else is said.
        """
        self._grow(max(query_times) + 1)
        at = send(torch.tensor(query_times), self._device)
        return Rotation(
            self._time,
            self._row,
            self._column,
            query_times_F=at,
            key_times_F=at if key_times is None else send(torch.tensor(key_times), self._device),
            start=self._shard.start,
            tokens=self._shard.tokens,
            columns=self._shard.grid.columns,
        )

    def rotate_on_read(self, places: Sequence[int], tokens: int) -> RotateOnRead:
        """How the keys of slots, of so many tokens each, are turned on read if they stand at these places in time."""
        self._grow(max(places) + 1)
        return RotateOnRead(self._time[send(torch.tensor(places), self._device)], tokens)

    def _grow(self, times: int) -> None:
        have = len(self._time)
        if times > have:
            self._time = self._table(max(times, 2 * have), self._time_frequencies)

    def _table(self, places: int, frequencies: Tensor) -> Tensor:
        """Cosines and sines of every place on an axis, (places, 2, E)."""
        angles = torch.outer(torch.arange(places, dtype=torch.float64), frequencies)
        return torch.stack([angles.cos(), angles.sin()], 1).to(self._device, self._dtype)


def _frequencies(pairs: int, theta: float) -> Tensor:
    return theta ** (-torch.arange(pairs, dtype=torch.float64) / pairs)
