"""The Triton kernel of x + y·gate and its LayerNorm, modulated by the token's frame or affine, in one pass over memory.

A program computes several tokens of one frame and reads the frame's vectors once for all of them. With one token a
program, the vectors would cost more reads than the token itself. The kernel reads x and y once and writes the sum and
its norm once: 4·T·D numbers with an addition, 2·T·D without.

Shapes: B batch, T tokens, F frames, s tokens of a frame, D model width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from causalrope_kernels.arguments import Affine, Norm
from causalrope_kernels.launch import Kernel, blocks_of, padded
from causalrope_kernels.tables import is_aligned

NUMBERS = 16_384  # a program holds about this many numbers at most
PROGRAMS = 512  # about this many programs keep a GPU busy


@triton.jit
def _once(pointer, mask):
    """Loads numbers that are read only once, so that they evict nothing from the caches that is read again."""
    return tl.load(pointer, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)


@triton.jit
def _vector(vectors, offset, channel, mask):
    """A frame's vector."""
    return tl.load(vectors + offset + channel, mask=mask, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["tokens", "frames"])  # these differ from rank to rank
def add_norm_kernel(
    x, y, total, normed, gate, factors, shifts,
    tokens, frames, eps,
    x_batch, x_token, y_batch, y_token, gate_batch, gate_frame, factor_batch, factor_frame, shift_batch, shift_frame,
    WIDTH: tl.constexpr, ADD: tl.constexpr, GATE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (i, b·F + f) computes the i-th block of tokens of frame f of batch entry b.

    `tokens` is the number of tokens of one frame.
    """
    batch, frame = tl.program_id(1) // frames, tl.program_id(1) % frames
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, BLOCK)
    valid = channel < WIDTH
    mask = (token < tokens)[:, None] & valid[None, :]
    row = (frame * tokens + token).to(tl.int64)
    written = (batch * frames * tokens + row)[:, None] * WIDTH + channel[None, :]

    x += batch.to(tl.int64) * x_batch
    value = _once(x + row[:, None] * x_token + channel[None, :], mask)
    if ADD:
        y += batch.to(tl.int64) * y_batch
        added = _once(y + row[:, None] * y_token + channel[None, :], mask)
        if GATE:
            added *= _vector(gate, batch * gate_batch + frame * gate_frame, channel, valid)[None, :]
        value += added
        tl.store(total + written, value.to(total.dtype.element_ty), mask=mask)

    mean = tl.sum(value, 1) / WIDTH
    centred = tl.where(mask, value - mean[:, None], 0.0)
    spread = tl.rsqrt(tl.sum(centred * centred, 1) / WIDTH + eps)
    factor = _vector(factors, batch * factor_batch + frame * factor_frame, channel, valid)
    offset = _vector(shifts, batch * shift_batch + frame * shift_frame, channel, valid)
    result = centred * spread[:, None] * factor[None, :] + offset[None, :]
    tl.store(normed + written, result.to(normed.dtype.element_ty), mask=mask)


KERNEL = Kernel(add_norm_kernel)


def add_norm(
    x_BTD: Tensor, y_BTD: Tensor | None, gate: Tensor | None, norm: Norm, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Launches the kernel; see `operations.add_norm`, which checks the arguments."""
    batch, count, width = x_BTD.shape
    normed = x_BTD.new_empty(batch, count, width) if out is None else out
    total = x_BTD if y_BTD is None or out is not None else torch.empty_like(normed)
    if normed.numel() == 0:
        return total, normed
    tensors = _tensors(x_BTD, y_BTD, total, normed, gate, norm)
    numbers, constants, grid, warps = _sizes(x_BTD, y_BTD, gate, tensors, norm.eps)
    KERNEL.launch(grid, tensors, numbers, constants, num_warps=warps)
    return total, normed


def settled_add_norm() -> Callable[..., tuple[Tensor, Tensor]]:
    """Returns `add_norm` for one place of a model, in place. At every call the tensors are contiguous and of the same
    dtypes, and y and gate are there or not.
    """
    launches: dict[tuple[object, ...], Callable[..., None]] = {}

    def add_norm(
        x_BTD: Tensor, y_BTD: Tensor | None, gate: Tensor | None, norm: Norm, out: Tensor
    ) -> tuple[Tensor, Tensor]:
        tensors = _tensors(x_BTD, y_BTD, x_BTD, out, gate, norm)
        vectors = tensors[5] if gate is None else gate
        key = x_BTD.shape, vectors.shape, is_aligned(x_BTD), is_aligned(vectors)
        launch = launches.get(key)
        if launch is not None:
            launch(*tensors)
        elif x_BTD.numel():
            numbers, constants, grid, warps = _sizes(x_BTD, y_BTD, gate, tensors, norm.eps)
            launches[key] = KERNEL.prepared(grid, tensors, numbers, constants, num_warps=warps)
        return x_BTD, out

    return add_norm


def _tensors(
    x_BTD: Tensor, y_BTD: Tensor | None, total: Tensor, normed: Tensor, gate: Tensor | None, norm: Norm
) -> tuple[Tensor, ...]:
    """The first arguments of the kernel."""
    factor, shift = (norm.weight, norm.bias) if isinstance(norm, Affine) else (norm.factor, norm.shift)
    return x_BTD, x_BTD if y_BTD is None else y_BTD, total, normed, x_BTD if gate is None else gate, factor, shift


def _sizes(
    x_BTD: Tensor, y_BTD: Tensor | None, gate: Tensor | None, tensors: tuple[Tensor, ...], eps: float
) -> tuple[tuple[Any, ...], tuple[Any, ...], tuple[int, int], int]:
    """The numbers and constants of the kernel, its grid, and its warps."""
    batch, count, width = x_BTD.shape
    _, y, _, _, _, factor, shift = tensors
    vectors = factor if gate is None else gate
    frames = 1 if vectors.ndim == 1 else vectors.shape[-2]
    grid, rows, block, warps = _blocks(batch, frames, count // frames, width)
    strides = *x_BTD.stride()[:2], *y.stride()[:2], *_strides(gate), *_strides(factor), *_strides(shift)
    constants = width, y_BTD is not None, gate is not None, rows, block
    return (count // frames, frames, eps, *strides), constants, grid, warps


@cache
def _blocks(batch: int, frames: int, tokens: int, width: int) -> tuple[tuple[int, int], int, int, int]:
    """The grid, the rows and the width of a program's block, and its warps."""
    block = padded(width)
    rows = rows_of(batch * frames * tokens, block)
    return (blocks_of(tokens, rows), batch * frames), rows, block, warps_of(rows * block)


def rows_of(count: int, block: int) -> int:
    """Returns how many rows of `block` numbers a program computes, for `count` rows in all.

    More rows share one read of the common vectors; fewer rows leave enough programs to keep a GPU busy.
    """
    most = 1 if block == 4096 else 8  # four such rows spill on sm_80, two on sm_120
    return max(1, min(NUMBERS // block, most, triton.next_power_of_2(count // PROGRAMS + 1) // 2))


def warps_of(numbers: int) -> int:
    """Returns the warps for a program that holds so many numbers: 32 a thread, which leaves registers for sums."""
    return max(1, min(16, numbers // 1024))


def _strides(vectors: Tensor | None) -> tuple[int, int]:
    """The strides from batch entry to batch entry and from frame to frame, in numbers; 0 where all share a vector."""
    if vectors is None or vectors.ndim == 1:
        return 0, 0
    strides = vectors.stride()
    return (0, strides[0]) if len(strides) == 2 else (strides[0], strides[1])
