"""The rotary angles of the tokens of a pass.

Shapes: F frames of a pass, s tokens of a frame, T = F·s, d head width, E angles of one axis (over all three axes
E = d/2).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from causalrope_kernels.tables import is_aligned


@dataclass(frozen=True)
class Rotation:
    """Rotary angles of the tokens of a pass, axis by axis. Token j of a frame has index start + j in its grid.

    A table holds the cosines, [:, 0], and sines, [:, 1], of every position on its axis, (positions, 2, E). Channels 2i
    and 2i + 1 of a head are a pair. The first pairs rotate by time, the next by row, the last by column (Wan: d//6 each
    for row and column, the rest for time).

    Args:
        time: the table of the time axis.
        row: the table of the rows of the grid.
        column: the table of the columns of the grid.
        query_times_F: the time positions of every frame's queries, integers on the device in [0, positions). They are
            not checked, since a kernel cannot read them on the host. In the `absolute` policy a position is the frame's
            global time index.
        key_times_F: the time positions of every frame's keys. In the `relative` policy they are 0: keys are rotated in
            time when they are read.
        start: the first token of a frame on this rank.
        tokens: s, the tokens of a frame on this rank.
        columns: the columns of the grid, in tokens.
    """

    time: Tensor
    row: Tensor
    column: Tensor
    query_times_F: Tensor
    key_times_F: Tensor
    start: int
    tokens: int
    columns: int

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """The numbers of the rotation that a kernel takes."""
        pairs = (table.shape[2] for table in (self.time, self.row, self.column))
        return self.start, self.tokens, self.columns, *pairs

    @cached_property
    def kinds(self) -> tuple[object, ...]:
        """What a kernel is compiled for besides `sizes`. It takes times at any alignment."""
        tables = (self.time, self.row, self.column)
        own = [(table.dtype, is_aligned(table)) for table in tables]
        return *own, self.query_times_F.dtype, self.key_times_F.dtype

    def part(self, frames: slice) -> Rotation:
        """Returns the rotation of some of the frames. It is made once, since every layer needs it."""
        which = frames.indices(len(self.query_times_F))
        if which == (0, len(self.query_times_F), 1):
            return self
        if which not in self._parts:
            frames = slice(*which)
            queries = self.query_times_F[frames]
            keys = queries if self.key_times_F is self.query_times_F else self.key_times_F[frames]
            self._parts[which] = replace(self, query_times_F=queries, key_times_F=keys)
        return self._parts[which]

    @cached_property
    def _parts(self) -> dict[tuple[int, int, int], Rotation]:
        return {}

    @cached_property
    def complex_TNE(self) -> Tensor:
        """The angles as complex numbers of modulus 1, (T, 2, d/2): those of every query and of every key."""
        return torch.stack([torch.complex(*self.of_queries), torch.complex(*self.of_keys)], 1)

    @cached_property
    def of_queries(self) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the angles of every query, each (T, d/2)."""
        return self._of_tokens(self.query_times_F)

    @cached_property
    def of_keys(self) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the angles of every key, each (T, d/2)."""
        return self.of_queries if self.key_times_F is self.query_times_F else self._of_tokens(self.key_times_F)

    def _of_tokens(self, times_F: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines of every token's angles for frames at these time positions."""
        index = torch.arange(self.start, self.start + self.tokens, device=self.time.device)
        spatial = torch.cat([self.row[index // self.columns], self.column[index % self.columns]], -1)
        temporal = self.time[times_F].unsqueeze(1).expand(-1, self.tokens, -1, -1)
        angles = torch.cat([temporal, spatial.expand(len(times_F), -1, -1, -1)], -1).flatten(0, 1)
        return angles[:, 0], angles[:, 1]
