"""The Triton kernel that quantizes rows to fp8. It reads every number once and writes it once.

Shapes: T rows, K width.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from causalrope_kernels.add_norm_kernel import rows_of, warps_of
from causalrope_kernels.launch import Kernel, blocks_of, padded


@triton.jit(do_not_specialize=["count"])
def quantize_kernel(
    x, numbers, scale, count, x_row, LARGEST: tl.constexpr, LEAST: tl.constexpr, WIDTH: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Program i quantizes the i-th block of ROWS rows."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, BLOCK)
    present = row < count
    mask = present[:, None] & (channel < WIDTH)[None, :]
    value = tl.load(x + row[:, None] * x_row + channel[None, :], mask=mask, other=0.0).to(tl.float32)
    largest = tl.maximum(tl.max(tl.abs(value), 1), LEAST)
    result = value * tl.div_rn(tl.full([ROWS], LARGEST, tl.float32), largest)[:, None]
    tl.store(numbers + row[:, None] * WIDTH + channel[None, :], result.to(numbers.dtype.element_ty), mask=mask)
    tl.store(scale + row, tl.div_rn(largest, tl.full([ROWS], LARGEST, tl.float32)), mask=present)


KERNEL = Kernel(quantize_kernel)


def quantize_rows(x_TK: Tensor, dtype: torch.dtype, largest: float, least: float) -> tuple[Tensor, Tensor]:
    """Launches the kernel.

    Args:
        x_TK: rows of contiguous numbers.
        dtype: of the numbers that are written.
        largest: the number that the largest one of a row becomes.
        least: what the largest one of a row counts as if it is smaller.

    Returns:
        The numbers, (T, K), and the scales of the rows in float32, (T, 1).
    """
    count, width = x_TK.shape
    numbers = torch.empty(count, width, dtype=dtype, device=x_TK.device)
    scale = torch.empty(count, 1, dtype=torch.float32, device=x_TK.device)
    if count and width:
        grid, rows, block, warps = _blocks(count, width)
        constants = largest, least, width, rows, block
        KERNEL.launch(grid, (x_TK, numbers, scale), (count, x_TK.stride(0)), constants, num_warps=warps)
    return numbers, scale


@cache
def _blocks(count: int, width: int) -> tuple[tuple[int], int, int, int]:
    """The grid, the rows and the width of a program's block, and its warps."""
    block = padded(width)
    rows = rows_of(count, block)
    return (blocks_of(count, rows),), rows, block, warps_of(rows * block)
