"""Where q, k, v of a pass come from, and the way from there straight to where they go next.

`Projection` holds them as the packed matrix product leaves them, `Pieces` as they arrived from other ranks. Both write
into rooms: a buffer, the pieces of a send buffer by heads, the slots of a cache.

Shapes: B batch, F frames, s tokens of a frame, H heads, d head width, D = H·d.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from causalrope_kernels import check, reference
from causalrope_kernels.arguments import Room, Rotation
from causalrope_kernels.backend import Backend, use_triton
from causalrope_kernels.reference import rms_norm, rotate

Rooms = Sequence[Room]


class Source(Protocol):
    """q, k, v of some frames."""

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """(B, F, s, H, d) of each of q, k, v."""

    @property
    def like(self) -> Tensor:
        """A tensor of the same dtype and device."""

    def part(self, frames: slice) -> Source:
        """Those of some of the frames."""

    def write(self, *, q: Rooms = (), k: Rooms = (), v: Rooms = (), backend: Backend = "auto") -> None:
        """Writes q, k, v, or those of them that have rooms; the heads go to the rooms in order.

        Raises:
            ValueError: rooms that do not hold just all of the heads, or are of another shape, dtype or device.
        """


@dataclass(frozen=True)
class Projection:
    """The packed projection to q, k, v, (B, F, s, 3·D). Written, q and k are normed over all of D, then rotated."""

    qkv_BFSN: Tensor
    q_weight: Tensor
    k_weight: Tensor
    rotation: Rotation
    heads: int
    eps: float

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        batch, frames, tokens, numbers = self.qkv_BFSN.shape
        return batch, frames, tokens, self.heads, numbers // 3 // self.heads

    @property
    def like(self) -> Tensor:
        return self.qkv_BFSN

    def part(self, frames: slice) -> Projection:
        return replace(self, qkv_BFSN=self.qkv_BFSN[:, frames], rotation=self.rotation.part(frames))

    def write(self, *, q: Rooms = (), k: Rooms = (), v: Rooms = (), backend: Backend = "auto") -> None:
        check.projection(self)
        check.rooms(self.shape, self.like, q=q, k=k, v=v)
        if use_triton(backend, self.qkv_BFSN):
            from causalrope_kernels.place_kernel import place_projection

            return place_projection(self, q, k, v)
        for number, rooms in enumerate((q, k, v)):
            if rooms:
                _put(rooms, self._third(number).unflatten(1, self.shape[1:3]))

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v as (B, T, H, d), differentiable."""
        return self._third(0), self._third(1), self._third(2)

    def _third(self, number: int) -> Tensor:
        """q, k or v by number, (B, T, H, d)."""
        x = self.qkv_BFSN.chunk(3, -1)[number].flatten(1, 2)
        if number < 2:
            x = reference.wide(x)
            x = rms_norm(x, (self.q_weight, self.k_weight)[number], self.eps).unflatten(-1, (self.heads, -1))
            x = rotate(x, *(self.rotation.of_queries, self.rotation.of_keys)[number])
            return x.to(self.qkv_BFSN.dtype)
        return x.unflatten(-1, (self.heads, -1))


@dataclass(frozen=True)
class Pieces:
    """Tokens as they arrived, a piece a rank, (N, B, F, s_r, H, d), the ranks' tokens of a frame side by side in order.

    N is 3 for q, k, v and 2 for k, v. Written, they are copied as they are.
    """

    pieces: Sequence[Tensor]

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        _, batch, frames, _, heads, width = self.pieces[0].shape
        return batch, frames, sum(piece.shape[3] for piece in self.pieces), heads, width

    @property
    def like(self) -> Tensor:
        return self.pieces[0]

    def part(self, frames: slice) -> Pieces:
        return Pieces([piece[:, :, frames] for piece in self.pieces])

    def write(self, *, q: Rooms = (), k: Rooms = (), v: Rooms = (), backend: Backend = "auto") -> None:
        check.pieces(self.pieces)
        check.rooms(self.shape, self.like, q=q, k=k, v=v)
        if use_triton(backend, self.like):
            from causalrope_kernels.place_kernel import place_pieces

            return place_pieces(self.pieces, q, k, v)
        for number, rooms in ((-3, q), (-2, k), (-1, v)):
            if rooms:
                _put(rooms, torch.cat([piece[number] for piece in self.pieces], 2))


def split_tokens(x_BFSHD: Tensor, pieces: Sequence[Tensor], backend: Backend = "auto") -> None:
    """The way back: tokens of all ranks, side by side in every frame, into a piece a rank, (B, F, s_r, H, d).

    Raises:
        ValueError: pieces that do not hold just all of the tokens, or are of another shape, dtype or device.
    """
    check.split(x_BFSHD, pieces)
    if use_triton(backend, x_BFSHD):
        from causalrope_kernels.place_kernel import place_tokens

        return place_tokens(x_BFSHD, pieces)
    for piece, part in zip(pieces, x_BFSHD.split([piece.shape[2] for piece in pieces], 2), strict=True):
        piece.copy_(part)


def _put(rooms: Rooms, value_BFSHD: Tensor) -> None:
    parts = value_BFSHD.split([room.x.shape[3] for room in rooms], 3)
    for room, part in zip(rooms, parts, strict=True):
        room.put(part)
