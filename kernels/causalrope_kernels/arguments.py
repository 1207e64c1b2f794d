"""Argument types of the operations: rotations, keys, modulations, sources of q, k, v and slots for the results.

Shapes: B batch, F frames of a pass, s tokens of a frame, T = F·s, L keys, H heads, d head width, D = H·d, K slots of a
ring, E angles of one axis (over all three axes E = d/2).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from causalrope_kernels.tables import is_aligned, on_device


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


@dataclass(frozen=True)
class Slots:
    """Memory that q, k or v of some heads are written to.

    Args:
        x: a tensor (B, F, s, h, d), such as a view of a send buffer. With `slots_F` it is a ring (B, K, s, h, d).
        slots_F: the slot of the ring that each frame is written to, int64 on the device, all different and in [0, K).
            They are not checked, since a kernel cannot read them on the host.
        memory: the same slots as a view (B, F, s, h, d), if they follow each other. It saves a CPU an indexed copy.
    """

    x: Tensor
    slots_F: Tensor | None = None
    memory: Tensor | None = None

    @cached_property
    def layout(self) -> tuple[object, ...]:
        """What a kernel takes from the memory besides its address."""
        return self.x.shape[3], self.x.stride(), self.slots_F is None, is_aligned(self.x)

    @cached_property
    def pairs(self) -> Tensor | None:
        """The channel pairs of all slots as complex numbers in the same memory; None for slots that are scattered."""
        plain = self.x if self.slots_F is None else self.memory
        return None if plain is None else as_complex(plain)


def as_complex(x: Tensor) -> Tensor:
    """Returns channel pairs (2i, 2i+1) as complex numbers that share the memory of the pairs."""
    return torch.view_as_complex(x.view(*x.shape[:-1], x.shape[-1] // 2, 2))


@dataclass(frozen=True)
class RotateOnRead:
    """The rotation in time of cached keys when they are read (the `relative` policy), slot by slot.

    Args:
        table: cosines and sines of each slot's time position, (K, 2, E). They rotate the first E channel pairs.
        tokens: the rows of the keys that make one slot.
    """

    table: Tensor
    tokens: int


@dataclass(frozen=True)
class Keys:
    """Keys and values, and the ranges of their rows that attention reads.

    Args:
        k: the keys, (B, L, H, d).
        v: the values, (B, L, H, d).
        ranges: the rows that are read, as disjoint [first, stop); None reads all rows.
        bounds_N2: the same ranges on the device, in int32. The Triton kernel reads them there, so that the ranges may
            change between replays of a captured graph.
        rotate_on_read: the rotation of the keys, or None for keys that are rotated already.
    """

    k: Tensor
    v: Tensor
    ranges: tuple[tuple[int, int], ...] | None = None
    bounds_N2: Tensor | None = None
    rotate_on_read: RotateOnRead | None = None

    @cached_property
    def bounds(self) -> Tensor:
        """The ranges on the device, (N, 2)."""
        if self.bounds_N2 is not None:
            return self.bounds_N2
        ranges = self.ranges if self.ranges is not None else ((0, self.k.shape[1]),)
        return on_device(tuple(map(tuple, ranges)), self.k.device, torch.int32)

    @cached_property
    def layout(self) -> tuple[object, ...]:
        """What a kernel takes from the memory besides its addresses."""
        k, v, rotate = self.k, self.v, self.rotate_on_read
        on_read = None if rotate is None else (rotate.tokens, rotate.table.shape[2])
        own = k.shape, k.stride(), v.stride(), is_aligned(k), is_aligned(v)
        return k.device, k.dtype, own, self.bounds.shape[0], on_read

    @cached_property
    def plain(self) -> list[tuple[Tensor, Tensor]]:
        """The keys, as they are stored, and the values of every range that is not empty."""
        ranges = self.ranges if self.ranges is not None else ((0, self.k.shape[1]),)
        return [(self.k[:, first:stop], self.v[:, first:stop]) for first, stop in ranges if stop > first]

    def heads(self, part: slice) -> Keys:
        """Returns the keys and values of some of the heads."""
        return replace(self, k=self.k[:, :, part], v=self.v[:, :, part])


@dataclass(frozen=True)
class Modulation:
    """A LayerNorm without weights, then x·factor + shift with the vectors of the token's frame.

    Args:
        shift: what is added, (F, D), or (B, F, D) where batch entries differ.
        factor: what is multiplied, of the same shape; in Wan's blocks it is 1 + scale.
        eps: the epsilon of the norm.
    """

    shift: Tensor
    factor: Tensor
    eps: float


@dataclass(frozen=True)
class Affine:
    """A LayerNorm, then x·weight + bias with vectors of (D,)."""

    weight: Tensor
    bias: Tensor
    eps: float


Norm = Modulation | Affine


@dataclass(frozen=True)
class Projection:
    """The packed projection to q, k, v, and how q and k are normed over all of D and then rotated.

    Args:
        qkv_BFSN: the projection, (B, F, s, 3·D).
        q_weight: the weight of the RMSNorm of q, (D,).
        k_weight: the weight of the RMSNorm of k, (D,).
        rotation: the rotary angles of the tokens.
        heads: H.
        eps: the epsilon of both norms.
    """

    qkv_BFSN: Tensor
    q_weight: Tensor
    k_weight: Tensor
    rotation: Rotation
    heads: int
    eps: float

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """(B, F, s, H, d) of each of q, k, v."""
        batch, frames, tokens, numbers = self.qkv_BFSN.shape
        return batch, frames, tokens, self.heads, numbers // 3 // self.heads

    @property
    def like(self) -> Tensor:
        """A tensor of the same dtype and device."""
        return self.qkv_BFSN

    def part(self, frames: slice) -> Projection:
        """Returns the projection of some of the frames."""
        own, rotation = self.qkv_BFSN[:, frames], self.rotation.part(frames)
        return Projection(own, self.q_weight, self.k_weight, rotation, self.heads, self.eps)


@dataclass(frozen=True)
class Pieces:
    """q, k, v as a collective delivered them: one piece per rank, in the order of the ranks' tokens of a frame.

    Args:
        pieces: tensors (N, B, F, s_r, H, d), parts of one buffer. N is 3 for q, k, v and 2 for k, v.
    """

    pieces: Sequence[Tensor]

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """(B, F, S, H, d) of each of q, k, v."""
        _, batch, frames, _, heads, width = self.pieces[0].shape
        return batch, frames, sum(piece.shape[3] for piece in self.pieces), heads, width

    @property
    def like(self) -> Tensor:
        """A tensor of the same dtype and device."""
        return self.pieces[0]

    def part(self, frames: slice) -> Pieces:
        """Returns the pieces of some of the frames."""
        return Pieces([piece[:, :, frames] for piece in self.pieces])


Source = Projection | Pieces
SlotsByHeads = Sequence[Slots]
