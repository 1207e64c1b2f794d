"""What Triton kernels compute of quantized heads in registers; `quantized_heads` is the torch reference.

Numbers of float8_e4m3fn pass as bytes, and are made of and into float16 by shifts, since GPUs before compute capability
8.9 have no such dtype.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def quantized(value, FLOAT8: tl.constexpr):
    """Quantizes heads, (heads, d) in float32 with zeros beyond d, to float8_e4m3fn or int8; returns numbers and scales.

    To add and subtract 1.5·2^23 units rounds to multiples of the unit, half to even.
    """
    LARGEST: tl.constexpr = 448.0 if FLOAT8 else 127.0
    largest = tl.max(tl.abs(value), 1)
    scale = tl.div_rn(largest, tl.full(largest.shape, LARGEST, tl.float32))  # `/` is an approximation on a GPU
    scale = tl.minimum(scale, 65504.0).to(tl.float16)
    divisor = tl.where(scale == 0.0, float("inf"), scale.to(tl.float32))
    number = tl.minimum(tl.maximum(tl.div_rn(value, divisor[:, None]), -LARGEST), LARGEST)
    if FLOAT8:
        # the unit is 2^-3 of the number's power of two, which is 2^-6 at least
        exponent = tl.maximum((number.to(tl.uint32, bitcast=True) >> 23) & 0xFF, 121)
        units = (((exponent + 20) << 23) | 0x400000).to(tl.float32, bitcast=True)
        half = (((number + units) - units) * 0.00390625).to(tl.float16).to(tl.uint16, bitcast=True)
        return (((half >> 8) & 0x80) | ((half >> 7) & 0x7F)).to(tl.uint8), scale
    else:
        return ((number + 12582912.0) - 12582912.0).to(tl.int8), scale


@triton.jit
def widened(number, dtype: tl.constexpr):
    """Returns numbers as they were loaded in the dtype of a product: those of float8 are 2^-8 of their value."""
    if number.dtype == tl.uint8:
        bits = number.to(tl.uint16)
        return (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.float16, bitcast=True).to(tl.float32).to(dtype)
    elif number.dtype == tl.int8:
        return number.to(tl.float32).to(dtype)
    else:
        return number


@triton.jit
def load_scales(scales, begin, row, by_row, valid, numbers, MASKED: tl.constexpr):
    """Loads the scales of some rows; those of float8 are made up for what `widened` leaves out."""
    offset = (tl.cast(begin, tl.int64) + row) * by_row
    if MASKED:
        scale = tl.load(scales + offset, mask=valid, other=0.0).to(tl.float32)
    else:
        scale = tl.load(scales + offset).to(tl.float32)
    if numbers.dtype.element_ty == tl.uint8:
        scale *= 256.0
    return scale
