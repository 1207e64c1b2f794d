"""Rotary tables of the three axes. Positions are arguments; this module knows nothing of ranks.

Wan gives the d/2 channel pairs of a head to time, height and width, d//2 - 2·(d//6), d//6 and d//6 of them, and uses
the frequencies theta^(-2i/n) on each axis, where n is the number of its channels.

Shapes: E angles of one axis.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from causalrope_kernels import RotateOnRead, Rotation
from causalrope_sp.devices import send
from causalrope_sp.grid import Shard

FIRST_TIMES = 1024  # the initial rows of the time axis' table


class RotaryTables:
    """The rotary angles of each axis, built in float64. The time axis is unbounded: its table grows with the stream.

    Args:
        head_dim: d.
        theta: the base of the frequencies; Wan uses 10000.
        shard: the tokens of a frame that this rank owns, with the grid.
        device: where the tables live.
        dtype: the dtype of the tables.
    """

    def __init__(self, head_dim: int, theta: float, shard: Shard, device: torch.device, dtype: torch.dtype) -> None:
        spatial = head_dim // 6
        self._shard, self._device, self._dtype = shard, device, dtype
        self._time_frequencies = frequencies(head_dim // 2 - 2 * spatial, theta)
        self._row = self._table(shard.grid.rows, frequencies(spatial, theta))
        self._column = self._table(shard.grid.columns, frequencies(spatial, theta))
        self._time = self._table(FIRST_TIMES, self._time_frequencies)

    def rotation(self, query_times: Sequence[int], key_times: Sequence[int] | None = None) -> Rotation:
        """Makes the rotation of this shard's tokens of some frames.

        Args:
            query_times: the time position of every frame's queries.
            key_times: the time position of every frame's keys; None for those of the queries.
        """
        self._grow(max(query_times) + 1)
        query_times_F = send(torch.tensor(query_times), self._device)
        return Rotation(
            self._time,
            self._row,
            self._column,
            query_times_F=query_times_F,
            key_times_F=query_times_F if key_times is None else send(torch.tensor(key_times), self._device),
            start=self._shard.start,
            tokens=self._shard.tokens,
            columns=self._shard.grid.columns,
        )

    def rotate_on_read(self, positions: Sequence[int], tokens: int) -> RotateOnRead:
        """Makes the rotation in time of cached keys when they are read.

        Args:
            positions: the time position of the frame in every slot.
            tokens: the tokens of a slot.
        """
        self._grow(max(positions) + 1)
        return RotateOnRead(self._time[send(torch.tensor(positions), self._device)], tokens)

    def _grow(self, times: int) -> None:
        """Enlarges the time axis' table to `times` positions, or to twice its size if that is more."""
        size = len(self._time)
        if times > size:
            self._time = self._table(max(times, 2 * size), self._time_frequencies)

    def _table(self, positions: int, frequencies: Tensor) -> Tensor:
        """Cosines and sines of every position on an axis, (positions, 2, E)."""
        angles = torch.outer(torch.arange(positions, dtype=torch.float64), frequencies)
        return torch.stack([angles.cos(), angles.sin()], 1).to(self._device, self._dtype)


def frequencies(pairs: int, theta: float) -> Tensor:
    """The angle per position of every channel pair of an axis."""
    return theta ** (-torch.arange(pairs, dtype=torch.float64) / pairs)
