"""The Triton kernel of x + y·gate and its LayerNorm, modulated by the token's frame or affine, in one pass over memory.

A program computes several tokens of one frame and reads the frame's vectors once for all of them. With one token a
program, the vectors would cost more reads than the token itself. The kernel reads x and y once and writes the sum and
its norm once: 4·T·D numbers with an addition, 2·T·D without.

Shapes: B batch, T tokens, F frames, s tokens of a frame, D model width.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from causalrope_kernels.arguments import Affine, ByFrame, Norm
from causalrope_kernels.tables import launching_on

NUMBERS = 16_384  # a program holds about this many numbers at most
PROGRAMS = 512  # about this many programs keep a GPU busy


@triton.jit
def _once(pointer, mask):
    """Loads numbers that are read only once, so that they evict nothing from the caches that is read again."""
    return tl.load(pointer, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)


@triton.jit
def _vector(time, learned, frame, channel, mask):
    """A frame's vector: the part from the time embedding plus the learned part."""
    by_time = tl.load(time + frame + channel, mask=mask, other=0.0).to(tl.float32)
    return by_time + tl.load(learned + channel, mask=mask, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["tokens", "frames"])  # these differ from rank to rank
def add_norm_kernel(
    x, y, total, normed,
    gate, gate_learned, scale, scale_learned, shift, shift_learned,
    tokens, frames, eps,
    x_batch, x_token, y_batch, y_token, gate_batch, gate_frame, scale_batch, scale_frame, shift_batch, shift_frame,
    WIDTH: tl.constexpr, ADD: tl.constexpr, GATE: tl.constexpr, AFFINE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
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
            added *= _vector(gate, gate_learned, batch * gate_batch + frame * gate_frame, channel, valid)[None, :]
        value += added
        tl.store(total + written, value.to(total.dtype.element_ty), mask=mask)

    mean = tl.sum(value, 1) / WIDTH
    centred = tl.where(mask, value - mean[:, None], 0.0)
    spread = tl.rsqrt(tl.sum(centred * centred, 1) / WIDTH + eps)
    if AFFINE:
        factor = tl.load(scale_learned + channel, mask=valid, other=0.0).to(tl.float32)
        offset = tl.load(shift_learned + channel, mask=valid, other=0.0).to(tl.float32)
    else:
        factor = 1.0 + _vector(scale, scale_learned, batch * scale_batch + frame * scale_frame, channel, valid)
        offset = _vector(shift, shift_learned, batch * shift_batch + frame * shift_frame, channel, valid)
    result = centred * spread[:, None] * factor[None, :] + offset[None, :]
    tl.store(normed + written, result.to(normed.dtype.element_ty), mask=mask)


def add_norm(x_BTD: Tensor, y_BTD: Tensor | None, gate: ByFrame | None, norm: Norm) -> tuple[Tensor, Tensor]:
    """Launches the kernel; see `operations.add_norm`, which checks the arguments."""
    batch, count, width = x_BTD.shape
    normed = x_BTD.new_empty(batch, count, width)
    total = x_BTD if y_BTD is None else torch.empty_like(normed)
    if normed.numel() == 0:
        return total, normed
    if isinstance(norm, Affine):
        scale = shift = None
        scale_learned, shift_learned = norm.weight, norm.bias
    else:
        scale, shift = norm.scale, norm.shift
        scale_learned, shift_learned = scale.learned_D, shift.learned_D
    vectors = gate or scale
    frames = 1 if vectors is None else vectors.time_FD.shape[-2]
    tokens = count // frames
    y = x_BTD if y_BTD is None else y_BTD
    block = triton.next_power_of_2(width)
    rows = rows_of(batch * count, block)
    with launching_on(x_BTD):
        add_norm_kernel[triton.cdiv(tokens, rows), batch * frames](
            x_BTD, y, total, normed,
            _time(gate, x_BTD), gate.learned_D if gate else x_BTD, _time(scale, x_BTD), scale_learned,
            _time(shift, x_BTD), shift_learned,
            tokens, frames, norm.eps,
            *x_BTD.stride()[:2], *y.stride()[:2], *_strides(gate), *_strides(scale), *_strides(shift),
            WIDTH=width, ADD=y_BTD is not None, GATE=gate is not None, AFFINE=isinstance(norm, Affine),
            ROWS=rows, BLOCK=block, num_warps=warps(rows * block),
        )  # fmt: skip
    return total, normed


def rows_of(count: int, block: int) -> int:
    """Returns how many rows of `block` numbers a program computes, for `count` rows in all.

    More rows share one read of the common vectors; fewer rows leave enough programs to keep a GPU busy.
    """
    return max(1, min(NUMBERS // block, 8, triton.next_power_of_2(count // PROGRAMS + 1) // 2))


def warps(numbers: int) -> int:
    """Returns the warps for a program that holds so many numbers: 32 a thread, which leaves registers for sums."""
    return max(1, min(16, numbers // 1024))


def _time(vector: ByFrame | None, unused: Tensor) -> Tensor:
    """The part of a vector that comes from the time embedding, or `unused` without a vector."""
    return unused if vector is None else vector.time_FD


def _strides(vector: ByFrame | None) -> tuple[int, int]:
    """The strides from batch entry to batch entry and from frame to frame, in numbers."""
    if vector is None:
        return 0, 0
    strides = vector.time_FD.stride()
    return (0, strides[0]) if len(strides) == 2 else (strides[0], strides[1])
