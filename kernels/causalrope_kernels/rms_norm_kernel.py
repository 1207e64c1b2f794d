"""The Triton kernel of RMSNorm over the last axis. It reads and writes every number once: 2·T·D numbers.

Shapes: T rows, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from causalrope_kernels.add_norm_kernel import rows_of, warps_of
from causalrope_kernels.launch import Kernel, blocks_of, padded


@triton.jit(do_not_specialize=["count"])
def rms_norm_kernel(
    x, weight, out, count, eps, x_row, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Program i norms the i-th block of ROWS rows."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, BLOCK)
    valid = channel < WIDTH
    mask = (row < count)[:, None] & valid[None, :]
    value = tl.load(x + row[:, None] * x_row + channel[None, :], mask=mask, other=0.0).to(tl.float32)
    spread = tl.rsqrt(tl.sum(value * value, 1) / WIDTH + eps)
    factor = tl.load(weight + channel, mask=valid, other=0.0).to(tl.float32)
    result = value * spread[:, None] * factor[None, :]
    tl.store(out + row[:, None] * WIDTH + channel[None, :], result.to(out.dtype.element_ty), mask=mask)


KERNEL = Kernel(rms_norm_kernel)


def rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor | None = None) -> Tensor:
    """Launches the kernel; see `operations.rms_norm`, which checks the arguments."""
    width = x.shape[-1]
    rows_of_x = x.reshape(-1, width)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    count = rows_of_x.shape[0]
    if count and width:
        grid, rows, block, warps = _blocks(count, width)
        tensors, numbers = (rows_of_x, weight, out), (count, eps, rows_of_x.stride(0))
        KERNEL.launch(grid, tensors, numbers, (width, rows, block), num_warps=warps)
    return out


def settled_rms_norm() -> Callable[..., Tensor]:
    """Returns `rms_norm` for one place of a model: its tensors are contiguous, and of the same dtypes at every call."""
    launches: dict[torch.Size, Callable[..., None]] = {}

    def rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor | None = None) -> Tensor:
        out = torch.empty_like(x) if out is None else out
        launch = launches.get(x.shape)
        if launch is not None:
            launch(x, weight, out)
        elif x.numel():
            width = x.shape[-1]
            count = x.numel() // width
            grid, rows, block, warps = _blocks(count, width)
            numbers, constants = (count, eps, width), (width, rows, block)
            launches[x.shape] = KERNEL.prepared(grid, (x, weight, out), numbers, constants, num_warps=warps)
        return out

    return rms_norm


@cache
def _blocks(count: int, width: int) -> tuple[tuple[int], int, int, int]:
    """The grid, the rows and the width of a program's block, and its warps."""
    block = padded(width)
    rows = rows_of(count, block)
    return (blocks_of(count, rows),), rows, block, warps_of(rows * block)
