"""Keys and values in 8 bits: numbers in int8 or float8_e4m3fn, and one scale for every token and head.

The torch reference; `quantized_heads_kernel` has the same for Triton. Shapes: d head width.
"""

from __future__ import annotations

import torch
from torch import Tensor

SCALE_DTYPE = torch.float16  # numbers are divided by the rounded scale, so that its rounding costs nothing
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}  # the largest number by storage dtype
LARGEST_SCALE = torch.finfo(SCALE_DTYPE).max


def quantize(x: Tensor, dtype: torch.dtype, *, overwrite: bool = False) -> tuple[Tensor, Tensor]:
    """Quantizes heads so that the largest number of each is the largest of the dtype.

    Args:
        x: the heads, (…, d), in float32 or float64.
        dtype: one of `LARGEST`.
        overwrite: whether `x` may be overwritten, which saves memory.

    Returns:
        The numbers, (…, d), and their scales, (…).
    """
    largest = LARGEST[dtype]
    maxima = torch.linalg.vector_norm(x, torch.inf, -1)
    # on CUDA a division by a number would multiply by its rounded inverse
    scales = maxima.div_(maxima.new_full((), largest)).clamp_(max=LARGEST_SCALE).to(SCALE_DTYPE)
    divisor = scales.to(x.dtype).masked_fill_(scales == 0, torch.inf).unsqueeze(-1)
    numbers = (x.div_(divisor) if overwrite else x / divisor).clamp_(-largest, largest)
    return (numbers.round_() if dtype == torch.int8 else numbers).to(dtype), scales


def dequantize(numbers: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns the heads, (…, d), of numbers, (…, d), and scales, (…)."""
    return numbers.to(dtype).mul_(scales.to(dtype).unsqueeze(-1))


def as_bits(x: Tensor) -> Tensor:
    """Returns float8 numbers as bytes that share their memory, and others as they are."""
    return x.view(torch.uint8) if x.dtype == torch.float8_e4m3fn else x
