"""Attention on quantized keys by torch: a block of them at a time is dequantized, and no more.

Shapes: B batch, T queries, L keys, H heads, d head width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from causalrope_kernels import reference
from causalrope_kernels.arguments import Keys
from causalrope_kernels.attention_libraries import by_torch
from causalrope_kernels.quantized_heads import dequantize
from causalrope_kernels.reference import Partial

BLOCK = 1024  # queries, and keys


def by_blocks(q_BTHD: Tensor, keys: Keys) -> Partial:
    """Attends all ranges of quantized keys, in float32 or wider.

    Args:
        q_BTHD: the queries.
        keys: keys and values with their scales, and the ranges of rows that are attended, by head or by all.

    Returns:
        The output, (B, T, H, d), and its log-sum-exp, (B, T, H): zeros and -inf where there is no key.
    """
    if keys.head_ranges is not None:
        return reference.by_rows(by_blocks, q_BTHD, keys)
    if keys.bands is not None:
        return reference.by_bands(by_blocks, q_BTHD, keys)
    output = torch.empty(q_BTHD.shape, dtype=q_BTHD.dtype, device=q_BTHD.device)
    lses = []
    for queries, part in zip(q_BTHD.split(BLOCK, 1), output.split(BLOCK, 1), strict=True):
        attended, lse = _few(reference.wide(queries), keys)
        part.copy_(attended)
        lses.append(lse)
    return output, torch.cat(lses, 1)


def _few(q: Tensor, keys: Keys) -> Partial:
    """Attends a block of queries on one block of keys after the other."""
    assert keys.k_scales is not None, "the keys are quantized"
    assert keys.v_scales is not None, "the values are quantized"
    rotate_on_read = keys.rotate_on_read
    output = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.full(q.shape[:3], -torch.inf, dtype=q.dtype, device=q.device)
    for begin, stop in keys.rows:
        for first in range(begin, stop, BLOCK):
            rows = slice(first, min(first + BLOCK, stop))
            k = dequantize(keys.k[:, rows], keys.k_scales[:, rows], q.dtype)
            v = dequantize(keys.v[:, rows], keys.v_scales[:, rows], q.dtype)
            k = k if rotate_on_read is None else reference.rotated(k, rotate_on_read, first)
            part, part_lse = by_torch(q, k, v)
            output.lerp_(part, torch.sigmoid(part_lse - lse).unsqueeze(-1))
            lse = torch.logaddexp(lse, part_lse)
    return output, lse
