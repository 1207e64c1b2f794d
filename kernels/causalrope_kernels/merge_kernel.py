"""The Triton kernel of the n-way merge of partial attention.

The kernel reads parts where they lie: in tensors of their own, or in a receive buffer where a log-sum-exp follows the
numbers of its output. It reads N·T·H·(d + 1) numbers and writes T·H·(d + 1).

Shapes: B batch, T queries, H heads, d head width, N parts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from causalrope_kernels.launch import Kernel, blocks_of, padded
from causalrope_kernels.reference import Partial

ROWS = 32
MOST = 32  # parts in one launch, since every part adds pointers and strides to the arguments


@triton.jit(do_not_specialize=["tokens", "heads"])
def merge_kernel(
    outputs, lses, merged, merged_lse,
    tokens, heads, output_strides, lse_strides,
    PARTS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program merges ROWS (token, head) pairs of one batch entry. Strides are those of batch, token and head."""
    pair = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    batch = tl.program_id(1).to(tl.int64)
    token, head = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    valid = pair < tokens * heads
    channel = tl.arange(0, BLOCK)
    mask = valid[:, None] & (channel < WIDTH)[None, :]

    total = tl.zeros([ROWS, BLOCK], tl.float32)
    weights = tl.zeros([ROWS], tl.float32)
    largest = tl.full([ROWS], float("-inf"), tl.float32)
    for part in tl.static_range(PARTS):
        by_batch, by_token, by_head = lse_strides[part]
        lse_offset = batch * by_batch + token * by_token + head * by_head
        lse = tl.load(lses[part] + lse_offset, mask=valid, other=float("-inf"))
        by_batch, by_token, by_head = output_strides[part]
        offset = batch * by_batch + token * by_token + head * by_head
        output = tl.load(outputs[part] + offset[:, None] + channel[None, :], mask=mask, other=0.0).to(tl.float32)
        # parts are added one by one, as flash attention adds its blocks: a new maximum rescales the sum so far
        new = tl.maximum(largest, lse)
        safe = tl.where(new == float("-inf"), 0.0, new)
        before, weight = tl.exp(largest - safe), tl.exp(lse - safe)
        total = total * before[:, None] + tl.where(weight[:, None] > 0, output, 0.0) * weight[:, None]
        weights = weights * before + weight
        largest = new
    empty = weights == 0.0
    divisor = tl.where(empty, 1.0, weights)
    written = batch * tokens * heads + pair
    tl.store(
        merged + written[:, None] * WIDTH + channel[None, :],
        (total / divisor[:, None]).to(merged.dtype.element_ty),
        mask=mask,
    )
    tl.store(merged_lse + written, tl.where(empty, float("-inf"), largest + tl.log(divisor)), mask=valid)


KERNEL = Kernel(merge_kernel)


def merge(parts: Sequence[Partial]) -> Partial:
    """Launches the kernel, once per `MOST` parts; see `attention.merge`, which checks the arguments."""
    if len(parts) > MOST:
        return merge([merge(parts[:MOST]), *parts[MOST:]])
    outputs, lses = zip(*parts, strict=True)
    batch, tokens, heads, width = outputs[0].shape
    merged = torch.empty(batch, tokens, heads, width, dtype=outputs[0].dtype, device=outputs[0].device)
    merged_lse = torch.empty(batch, tokens, heads, dtype=lses[0].dtype, device=merged.device)
    if merged_lse.numel():
        strides = tuple(x.stride()[:3] for x in outputs), tuple(x.stride() for x in lses)
        KERNEL.launch(
            (blocks_of(tokens * heads, ROWS), batch),
            (outputs, lses, merged, merged_lse),
            (tokens, heads, *strides),
            (len(parts), width, ROWS, padded(width)),
            num_warps=4,
        )
    return merged, merged_lse
