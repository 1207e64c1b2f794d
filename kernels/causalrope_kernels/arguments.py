"""Argument types of the operations: keys, modulations, sources of q, k, v and slots for the results.

Shapes: B batch, F frames of a pass, s tokens of a frame, T = F·s, L keys, H heads, d head width, D = H·d, K slots of a
ring, E angles of one axis.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby

import torch
from torch import Tensor

from causalrope_kernels.bands import Bands
from causalrope_kernels.quantized_heads import as_bits
from causalrope_kernels.rotation import Rotation
from causalrope_kernels.tables import is_aligned, on_device

Ranges = tuple[tuple[int, int], ...]  # rows, as [first, stop)


@dataclass(frozen=True)
class Slots:
    """Memory that q, k or v of some heads are written to.

    Args:
        x: a tensor (B, F, s, h, d), such as a view of a send buffer. With `slots_F` it is a ring (B, K, s, h, d).
        slots_F: the slot of the ring that each frame is written to, int64 on the device, all different and in [0, K).
            They are not checked, since a kernel cannot read them on the host.
        memory: the same slots as a view (B, F, s, h, d), if they follow each other. It saves a CPU an indexed copy.
        scales: for `x` in int8 or float8_e4m3fn the scale of every token and head, float16, of the shape and layout of
            `x` without its last axis. What is written is quantized, or is already.
    """

    x: Tensor
    slots_F: Tensor | None = None
    memory: Tensor | None = None
    scales: Tensor | None = None

    @cached_property
    def layout(self) -> tuple[object, ...]:
        """What a kernel takes from the memory besides its addresses."""
        extra = None if self.scales is None else (self.x.dtype, _kind(self.scales))
        return self.x.shape[3], self.x.stride(), self.slots_F is None, is_aligned(self.x), extra

    @cached_property
    def bits(self) -> Tensor:
        """What a kernel writes: `x`, or the bits of its float8 numbers, a dtype that not every GPU has."""
        return as_bits(self.x)

    @cached_property
    def pairs(self) -> Tensor | None:
        """The channel pairs of all slots as complex numbers in the same memory; None for slots that are scattered."""
        plain = self.x if self.slots_F is None else self.memory
        return None if plain is None or self.scales is not None else as_complex(plain)


def _kind(x: Tensor | None) -> tuple[object, ...] | None:
    """What a kernel takes from a tensor besides its address."""
    return None if x is None else (x.stride(), is_aligned(x))


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
        bounds_N2: the same ranges on the device, in int32, (N, 2) or with `head_ranges` (H, N, 2). The Triton kernel
            reads them there, so that the ranges may change between replays of a captured graph.
        rotate_on_read: the rotation of the keys, or None for keys that are rotated already.
        k_scales: for keys in int8 or float8_e4m3fn the scale of every row and head, float16 (B, L, H), in the layout of
            `k` without its last axis.
        v_scales: the same for the values.
        head_ranges: where heads read different rows the ranges of every head, N each, of which some may be empty; None
            if all heads read `ranges`.
        bands: the tokens of each slot that queries see, of ranges of whole slots; None if they see all rows.
    """

    k: Tensor
    v: Tensor
    ranges: Ranges | None = None
    bounds_N2: Tensor | None = None
    rotate_on_read: RotateOnRead | None = None
    k_scales: Tensor | None = None
    v_scales: Tensor | None = None
    head_ranges: tuple[Ranges, ...] | None = None
    bands: Bands | None = None

    @cached_property
    def plain_rows(self) -> bool:
        """Whether all queries of all heads read the same rows, as they are."""
        return self.rotate_on_read is None and self.head_ranges is None and self.bands is None

    @cached_property
    def one_part(self) -> bool:
        """Whether all queries of all heads read one range of keys that are not quantized."""
        return self.k_scales is None and self.head_ranges is None and self.bands is None and len(self.plain) == 1

    @property
    def rows(self) -> Ranges:
        """The ranges that all heads read."""
        assert self.head_ranges is None, "heads that read different rows are attended by `by_rows`"
        return self.ranges if self.ranges is not None else ((0, self.k.shape[1]),)

    @cached_property
    def bounds(self) -> Tensor:
        """The ranges on the device, (N, 2) or, where heads read different rows, (H, N, 2)."""
        if self.bounds_N2 is not None:
            return self.bounds_N2
        if self.head_ranges is not None:
            return torch.tensor(self.head_ranges, dtype=torch.int32, device=self.k.device)
        return on_device(tuple(map(tuple, self.rows)), self.k.device, torch.int32)

    @cached_property
    def layout(self) -> tuple[object, ...]:
        """What a kernel takes from the memory besides its addresses: all that it is compiled for."""
        k, v, rotate = self.k, self.v, self.rotate_on_read
        on_read = None
        if rotate is not None:
            on_read = rotate.tokens, rotate.table.shape[2], rotate.table.dtype, is_aligned(rotate.table)
        own = k.shape, k.stride(), v.stride(), is_aligned(k), is_aligned(v)
        scales = tuple(map(_kind, (self.k_scales, self.v_scales)))
        bounds = self.bounds.shape[:-1], self.bounds.dtype, is_aligned(self.bounds)
        return k.device, k.dtype, own, scales, bounds, on_read, self.bands

    @cached_property
    def bits(self) -> tuple[Tensor, Tensor]:
        """What a kernel reads: `k` and `v`, or the bits of their float8 numbers."""
        return as_bits(self.k), as_bits(self.v)

    @cached_property
    def plain(self) -> list[tuple[Tensor, Tensor]]:
        """The keys, as they are stored, and the values of every range that is not empty."""
        return [(self.k[:, first:stop], self.v[:, first:stop]) for first, stop in self.rows if stop > first]

    def heads(self, part: slice) -> Keys:
        """Returns the keys and values of some of the heads."""
        k_scales, v_scales = (None if x is None else x[:, :, part] for x in (self.k_scales, self.v_scales))
        own = replace(self, k=self.k[:, :, part], v=self.v[:, :, part], k_scales=k_scales, v_scales=v_scales)
        if self.head_ranges is None:
            return own
        bounds = None if self.bounds_N2 is None else self.bounds_N2[part]
        return replace(own, bounds_N2=bounds, head_ranges=self.head_ranges[part])

    @cached_property
    def by_rows(self) -> list[Keys]:
        """The keys and values of heads that follow each other and read the same rows, in order of heads."""
        if self.head_ranges is None:
            return [self]
        found, first = [], 0
        for ranges, same in groupby(self.head_ranges):
            part = slice(first, first + len(list(same)))
            found.append(replace(self.heads(part), ranges=ranges, bounds_N2=None, head_ranges=None))
            first = part.stop
        return found


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


@dataclass(frozen=True)
class QuantizedPieces:
    """q, and keys and values that were quantized before a collective delivered them: one piece of each per rank.

    Args:
        q: tensors (B, F, s_r, H, d), parts of one buffer; empty if only k, v arrived.
        numbers: tensors (2, B, F, s_r, H, d) in int8 or float8_e4m3fn, k and v, parts of one buffer.
        scales: their scales, tensors (2, B, F, s_r, H) in float16, parts of one buffer.
    """

    q: Sequence[Tensor]
    numbers: Sequence[Tensor]
    scales: Sequence[Tensor]

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """(B, F, S, H, d) of each of q, k, v."""
        return Pieces(self.numbers).shape

    @property
    def like(self) -> Tensor:
        """The first part of q, or the first scales if there is no q: a tensor on the device of all of them."""
        return self.q[0] if self.q else self.scales[0]

    def part(self, frames: slice) -> QuantizedPieces:
        """Returns the pieces of some of the frames."""
        kv = ([x[:, :, frames] for x in pieces] for pieces in (self.numbers, self.scales))
        return QuantizedPieces([x[:, frames] for x in self.q], *kv)


Source = Projection | Pieces | QuantizedPieces
SlotsByHeads = Sequence[Slots]
