"""x + y·gate and its LayerNorm, modulated by the token's frame or affine, in one pass over memory.

A program takes some tokens of one frame, so that what the frame carries is read once for all of them: with one token
a program those vectors would cost more than the token itself. x and y are read once, the sum and its norm written once:
4·T·D numbers, 2·T·D where nothing is added.
Shapes: B batch, T tokens, F frames, s tokens of a frame, D model width.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from causalrope_kernels.arguments import Affine, ByFrame, Norm
from causalrope_kernels.tables import launching_on

NUMBERS = 16_384  # that a program holds at most, about
PROGRAMS = 512  # that keep a GPU busy, about


@triton.jit
def _once(pointer, mask):
    """What nobody reads again, so that it pushes nothing out of the caches that somebody will."""
    return tl.load(pointer, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)


@triton.jit
def _vector(time, learned, frame, channel, mask):
    """A frame's vector: what time makes of it plus what is learned."""
    by_time = tl.load(time + frame + channel, mask=mask, other=0.0).to(tl.float32)
    return by_time + tl.load(learned + channel, mask=mask, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["tokens", "frames"])  # what differs from rank to rank
def add_norm_kernel(
    x, y, total, normed,
    gate, gate_learned, scale, scale_learned, shift, shift_learned,
    tokens, frames, eps,
    x_batch, x_token, y_batch, y_token, gate_batch, gate_frame, scale_batch, scale_frame, shift_batch, shift_frame,
    WIDTH: tl.constexpr, ADD: tl.constexpr, GATE: tl.constexpr, AFFINE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (i, b·F + f): the i-th block of tokens of frame f. `tokens` are those of one frame."""
    batch, frame = tl.program_id(1) // frames, tl.program_id(1) % frames
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, BLOCK)
    real = channel < WIDTH
    mask = (token < tokens)[:, None] & real[None, :]
    row = (frame * tokens + token).to(tl.int64)
    written = (batch * frames * tokens + row)[:, None] * WIDTH + channel[None, :]

    x += batch.to(tl.int64) * x_batch
    value = _once(x + row[:, None] * x_token + channel[None, :], mask)
    if ADD:
        y += batch.to(tl.int64) * y_batch
        added = _once(y + row[:, None] * y_token + channel[None, :], mask)
        if GATE:
            added *= _vector(gate, gate_learned, batch * gate_batch + frame * gate_frame, channel, real)[None, :]
        value += added
        tl.store(total + written, value.to(total.dtype.element_ty), mask=mask)

    mean = tl.sum(value, 1) / WIDTH
    centred = tl.where(mask, value - mean[:, None], 0.0)
    spread = tl.rsqrt(tl.sum(centred * centred, 1) / WIDTH + eps)
    if AFFINE:
        factor = tl.load(scale_learned + channel, mask=real, other=0.0).to(tl.float32)
        offset = tl.load(shift_learned + channel, mask=real, other=0.0).to(tl.float32)
    else:
        factor = 1.0 + _vector(scale, scale_learned, batch * scale_batch + frame * scale_frame, channel, real)
        offset = _vector(shift, shift_learned, batch * shift_batch + frame * shift_frame, channel, real)
    result = centred * spread[:, None] * factor[None, :] + offset[None, :]
    tl.store(normed + written, result.to(normed.dtype.element_ty), mask=mask)


def add_norm(x_BTD: Tensor, y_BTD: Tensor | None, gate: ByFrame | None, norm: Norm) -> tuple[Tensor, Tensor]:
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
    """How many rows of a block a program takes: many, to read what they share but once; but leave work for all."""
    return max(1, min(NUMBERS // block, 8, triton.next_power_of_2(count // PROGRAMS + 1) // 2))


def warps(numbers: int) -> int:
    """Warps for a program that holds so many numbers: 32 a thread, which leaves registers for a sum's terms."""
    return max(1, min(16, numbers // 1024))


def _time(vector: ByFrame | None, unused: Tensor) -> Tensor:
    return unused if vector is None else vector.time_FD


def _strides(vector: ByFrame | None) -> tuple[int, int]:
    """Numbers from one batch entry to the next, and from frame to frame."""
    if vector is None:
        return 0, 0
    strides = vector.time_FD.stride()
    return (0, strides[0]) if len(strides) == 2 else (strides[0], strides[1])
