"""What the blocks and the head of a DiT take from the timesteps of a pass: norms with shifts and factors, and gates.

Shapes: F frames of the pass, or 1 for all of them, D model width, L blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor, nn

from causalrope_kernels import Affine, Modulation
from causalrope_kernels.arguments import Norm
from causalrope_kernels.reference import wide


class BlockModulation(NamedTuple):
    """The norms before self-attention and the feed-forward, and the gates, (…, F, D), after them."""

    norm_1: Norm
    gate_1: Tensor
    norm_2: Norm
    gate_2: Tensor


@dataclass(frozen=True)
class PassModulation:
    """What the model computes of the timesteps of a pass, and of nothing else.

    Args:
        blocks_L6FD: shift, factor (one plus the scale) and gate of self-attention, then of the feed-forward, of every
            block, (L, 6, …, F, D), in float32 or wider.
        head_2FD: shift and factor of the head, (2, …, F, D).
        eps: the epsilon of the blocks' norms.
        head_eps: the epsilon of the head's norm.
    """

    blocks_L6FD: Tensor
    head_2FD: Tensor
    eps: float
    head_eps: float

    @cached_property
    def blocks(self) -> list[BlockModulation]:
        """Norms and gates block by block."""
        return [self._block(*vectors_6FD.unbind(0)) for vectors_6FD in self.blocks_L6FD.unbind(0)]

    @cached_property
    def head(self) -> Norm:
        """The norm of the head for all frames."""
        shift, factor = self.head_2FD
        return norm(shift, factor, self.head_eps)

    def last(self, groups: int) -> tuple[BlockModulation, Norm]:
        """Returns what the last block and the head take for the last `groups` timesteps; norm_1 is that of all."""
        vectors_6FD = self.blocks_L6FD[-1][..., -groups:, :]
        block = self._block(*vectors_6FD.unbind(0))._replace(norm_1=self.blocks[-1].norm_1)
        shift, factor = self.head_2FD[..., -groups:, :]
        return block, norm(shift, factor, self.head_eps)

    def _block(self, shift_1: Tensor, factor_1: Tensor, gate_1: Tensor, *last: Tensor) -> BlockModulation:
        shift_2, factor_2, gate_2 = last
        norm_1, norm_2 = norm(shift_1, factor_1, self.eps), norm(shift_2, factor_2, self.eps)
        return BlockModulation(norm_1, gate_1, norm_2, gate_2)


def norm(shift: Tensor, factor: Tensor, eps: float) -> Norm:
    """Returns the norm that these vectors, (…, F, D), modulate: with F = 1 all tokens share them."""
    if shift.shape[:-1] == (1,):
        return Affine(factor[0], shift[0], eps)
    return Modulation(shift, factor, eps)


def modulate(
    time_FD: Tensor, time_F6D: Tensor, tables_L6D: Tensor, head_table_2D: Tensor, eps: float, head_eps: float
) -> PassModulation:
    """Adds the learned tables of blocks and head to the embedding of the timesteps.

    Args:
        time_FD: the embedded timesteps, (…, F, D).
        time_F6D: their projection for the blocks, (…, F, 6, D).
        tables_L6D: the tables of the blocks: shift, scale and gate of attention, then of the feed-forward.
        head_table_2D: the table of the head: shift and scale.
        eps: the epsilon of the blocks' norms.
        head_eps: the epsilon of the head's norm.

    Returns:
        The modulation, in float32 or wider.
    """
    tables_L6D = wide(tables_L6D)
    tables_L6D = tables_L6D.view(len(tables_L6D), *(1,) * (time_FD.ndim - 1), *tables_L6D.shape[1:])
    blocks_LF6D = wide(time_F6D) + tables_L6D
    blocks_LF6D[..., 1::3, :] += 1  # scales become factors
    shift, scale = (wide(time_FD) + wide(learned) for learned in head_table_2D)
    return PassModulation(blocks_LF6D.movedim(-2, 1).contiguous(), torch.stack([shift, 1 + scale]), eps, head_eps)


def modulation_table(rows: int, dim: int) -> nn.Parameter:
    """The learned part of shifts, scales and gates.

    On the meta device no random numbers are drawn, since torch would import sympy for that: 75 MB and over a second.
    """
    table = torch.empty(rows, dim)
    return nn.Parameter(table if table.is_meta else torch.randn(rows, dim) / dim**0.5)
