"""What the operations take, beside tensors: rotations, keys, and where results go.

Shapes: B batch, F frames of a pass, s tokens of a frame, T = F·s, L keys, H heads, d head width, D = H·d, K slots of a
ring, E angles of one axis (over all three axes E = d/2).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rotation:
    """Rotary angles of the tokens of a pass, axis by axis: token j of a frame stands at g = start + j in its grid.

    A table holds the cosines, [:, 0], and sines, [:, 1], of every place on its axis, (places, 2, E). A head's channels
    2i and 2i + 1 are a pair; its first pairs are turned by time, then come those of row and of column (Wan: d//6 each,
    and time has the rest). Queries and keys of frame f stand at `query_times_F[f]` and `key_times_F[f]`, integers on
    the device: where a stream stands is no part of a kernel. They are in [0, places): whoever makes them sees to that.
    With the `absolute` policy both are the global time index, with `relative` a key's is 0 until it is read.
    """

    time: Tensor
    row: Tensor
    column: Tensor
    query_times_F: Tensor
    key_times_F: Tensor
    start: int
    tokens: int
    columns: int

    def part(self, frames: slice) -> Rotation:
        """That of some of the frames; made once, since every layer asks."""
        which = frames.indices(len(self.query_times_F))
        if which not in self._parts:
            frames = slice(*which)
            queries = self.query_times_F[frames]
            keys = queries if self.key_times_F is self.query_times_F else self.key_times_F[frames]
            self._parts[which] = replace(self, query_times_F=queries, key_times_F=keys)
        return self._parts[which]

    @cached_property
    def _parts(self) -> dict[tuple[int, int, int], Rotation]:
        return {(0, len(self.query_times_F), 1): self}

    @cached_property
    def of_queries(self) -> tuple[Tensor, Tensor]:
        """Cosine and sine of every token's angles, each (T, d/2)."""
        return self._of_tokens(self.query_times_F)

    @cached_property
    def of_keys(self) -> tuple[Tensor, Tensor]:
        return self.of_queries if self.key_times_F is self.query_times_F else self._of_tokens(self.key_times_F)

    def _of_tokens(self, times_F: Tensor) -> tuple[Tensor, Tensor]:
        place = torch.arange(self.start, self.start + self.tokens, device=self.time.device)
        where = torch.cat([self.row[place // self.columns], self.column[place % self.columns]], -1)
        when = self.time[times_F].unsqueeze(1).expand(-1, self.tokens, -1, -1)
        angles = torch.cat([when, where.expand(len(times_F), -1, -1, -1)], -1).flatten(0, 1)
        return angles[:, 0], angles[:, 1]


@dataclass(frozen=True)
class Slots:
    """Where q, k or v of some heads go: `x`, (B, F, s, h, d), a view of a send buffer, say.

    With `slots_F`, integers on the device, `x` is a ring (B, K, s, h, d) and frame f goes to slot `slots_F[f]`. They
    are different and in [0, K): whoever makes them sees to that, for a kernel cannot ask.
    """

    x: Tensor
    slots_F: Tensor | None = None


@dataclass(frozen=True)
class RotateOnRead:
    """How keys are turned on read, the `relative` policy: slot by slot, by the cosines and sines of its place in time.

    `table` is (K, 2, E) and turns the first E channel pairs, those of time; `tokens` rows of the keys are one slot.
    """

    table: Tensor
    tokens: int


@dataclass(frozen=True)
class Keys:
    """Keys and values, each (B, L, H, d), of which the rows in `stretches`, disjoint [first, stop), are attended.

    `bounds_N2` is the same on the device, in int32: a Triton kernel reads it there, so that what is attended may change
    under a captured graph. Without stretches all rows are attended.
    """

    k: Tensor
    v: Tensor
    ranges: tuple[tuple[int, int], ...] | None = None
    bounds_N2: Tensor | None = None
    rotate_on_read: RotateOnRead | None = None

    def heads(self, part: slice) -> Keys:
        return replace(self, k=self.k[:, :, part], v=self.v[:, :, part])


@dataclass(frozen=True)
class ByFrame:
    """A vector that every token of a frame shares: what time makes of the frame plus what is learned.

    `time_FD` is (F, D), or (B, F, D) where the batch differs; `learned_D` is (D,).
    """

    time_FD: Tensor
    learned_D: Tensor

    @staticmethod
    def unbind(time_FND: Tensor, learned_ND: Tensor) -> list[ByFrame]:
        """The N vectors of a block's modulation, (…, F, N, D) and (N, D)."""
        return [ByFrame(t, w) for t, w in zip(time_FND.unbind(-2), learned_ND.unbind(0), strict=True)]

    def frames(self, part: slice) -> ByFrame:
        return ByFrame(self.time_FD[..., part, :], self.learned_D)


@dataclass(frozen=True)
class Modulation:
    """After a LayerNorm without weights: x·(1 + scale) + shift, with those of the token's frame."""

    shift: ByFrame
    scale: ByFrame
    eps: float


@dataclass(frozen=True)
class Affine:
    """After a LayerNorm: x·weight + bias, each (D,)."""

    weight: Tensor
    bias: Tensor
    eps: float


Norm = Modulation | Affine


@dataclass(frozen=True)
class Projection:
    """The packed projection to q, k, v, (B, F, s, 3·D), from which q and k are normed over all of D, then rotated."""

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
        """That of some of the frames."""
        return replace(self, qkv_BFSN=self.qkv_BFSN[:, frames], rotation=self.rotation.part(frames))


@dataclass(frozen=True)
class Pieces:
    """q, k, v as they arrived: a piece a rank, (N, B, F, s_r, H, d), the ranks' tokens of a frame in order.

    N is 3 for q, k, v and 2 for k, v. All pieces are parts of one buffer.
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
        """Those of some of the frames."""
        return Pieces([piece[:, :, frames] for piece in self.pieces])


Source = Projection | Pieces
SlotsByHeads = Sequence[Slots]
