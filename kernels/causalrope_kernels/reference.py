"""The torch reference of every operation, which defines its result. Arguments are as in `operations` and `attention`.

Half-precision input is computed in float32, anything else in its own dtype.

Shapes: B batch, T tokens, F frames (T = F·s), L keys, H heads, d head width, D = H·d. Vectors of
frames, (F, D), may also differ by batch entry, (B, F, D).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from causalrope_kernels.arguments import (
    Affine,
    Keys,
    Norm,
    Pieces,
    Projection,
    QuantizedPieces,
    RotateOnRead,
    Slots,
    SlotsByHeads,
    Source,
)
from causalrope_kernels.quantized_heads import as_bits, quantize

Partial = tuple[Tensor, Tensor]  # attention over some of the keys, (B, T, H, d), and its log-sum-exp, (B, T, H)


def wide(x: Tensor) -> Tensor:
    """Returns `x` in the dtype that it is computed in."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def rotate(x_BTHD: Tensor, cos_TE: Tensor, sin_TE: Tensor) -> Tensor:
    """Rotates the channel pairs (2i, 2i+1) of every head by the token's angles; E = d/2."""
    even, odd = x_BTHD.to(cos_TE.dtype).unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos_TE.unsqueeze(-2), sin_TE.unsqueeze(-2)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2).to(x_BTHD.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Computes x / sqrt(mean(x²) + eps) · weight over the last axis."""
    wide_x = wide(x)
    return functional.rms_norm(wide_x, x.shape[-1:], weight.to(wide_x.dtype), eps).to(x.dtype)


def add_norm(x_BTD: Tensor, y_BTD: Tensor | None, gate: Tensor | None, norm: Norm) -> tuple[Tensor, Tensor]:
    """Computes the residual x + y·gate, rounded to x's dtype, and its LayerNorm, computed before that rounding.

    The gate is 1 if it is None. Nothing is added if y is None.
    """
    x = wide(x_BTD)
    dtype = x.dtype
    if y_BTD is not None:
        y = y_BTD.to(dtype)
        x = x + (y if gate is None else (by_frame(y, gate) * gate.to(dtype).unsqueeze(-2)).flatten(1, 2))
    total = x_BTD if y_BTD is None else x.to(x_BTD.dtype)
    if isinstance(norm, Affine):
        weight, bias = norm.weight.to(dtype), norm.bias.to(dtype)
        return total, functional.layer_norm(x, x.shape[-1:], weight, bias, norm.eps).to(x_BTD.dtype)
    shift, factor = (vector.to(dtype).unsqueeze(-2) for vector in (norm.shift, norm.factor))
    normed = by_frame(functional.layer_norm(x, x.shape[-1:], eps=norm.eps), norm.shift)
    return total, torch.addcmul(shift, normed, factor).flatten(1, 2).to(x_BTD.dtype)


def by_frame(x_BTD: Tensor, vectors: Tensor) -> Tensor:
    """Returns the tokens frame by frame, (B, F, s, D), for vectors of F frames, (…, F, D)."""
    batch, tokens, dim = x_BTD.shape
    return x_BTD.view(batch, vectors.shape[-2], tokens // vectors.shape[-2], dim)


def project(projection: Projection) -> tuple[Tensor, Tensor, Tensor]:
    """Computes q, k and v of a projection, differentiably.

    Returns:
        q, k and v, each (B, T, H, d). q and k are normed over all of D, rotated, and rounded once, at the end.
    """
    return _third(projection, 0), _third(projection, 1), _third(projection, 2)


def _third(projection: Projection, number: int) -> Tensor:
    """q, k or v of a projection, for number 0, 1 or 2, (B, T, H, d)."""
    x, rotation = projection.qkv_BFSN.chunk(3, -1)[number].flatten(1, 2), projection.rotation
    if number == 2:
        return x.unflatten(-1, (projection.heads, -1))
    weight = (projection.q_weight, projection.k_weight)[number]
    normed = rms_norm(wide(x), weight, projection.eps).unflatten(-1, (projection.heads, -1))
    return rotate(normed, *(rotation.of_queries, rotation.of_keys)[number]).to(x.dtype)


def norm_rope_store(
    source: Source, q: SlotsByHeads, k: SlotsByHeads, v: SlotsByHeads, k_offset: Tensor | None = None
) -> None:
    """Writes q, k and v to their slots, if there are any. Heads fill the `Slots` of a list in order."""
    for number, outputs in enumerate((q, k, v)):
        if not outputs:
            continue
        if isinstance(source, QuantizedPieces) and number:
            _put_quantized(outputs, source, number - 1)
        elif isinstance(source, QuantizedPieces):
            put_heads(outputs, torch.cat(tuple(source.q), 2))
        elif isinstance(source, Pieces):
            put_heads(outputs, torch.cat([piece[number - 3] for piece in source.pieces], 2))
        else:
            value = _third(source, number).unflatten(1, source.shape[1:3])
            put_heads(outputs, value, k_offset if number == 1 else None)


def put_heads(
    outputs: SlotsByHeads, value_BFSHD: Tensor, offset_BHD: Tensor | None = None, *, overwrite: bool = False
) -> None:
    """Writes q, k or v to the slots of all heads, in order, quantized if these have scales.

    Args:
        outputs: the slots.
        value_BFSHD: what is written.
        offset_BHD: what is taken off before it is quantized, or None.
        overwrite: whether the value may be overwritten.
    """
    if outputs[0].scales is not None:
        value = wide(value_BFSHD)
        overwrite = overwrite or value is not value_BFSHD
        if offset_BHD is not None:
            offset = offset_BHD[:, None, None].to(value.dtype)
            value, overwrite = value.sub_(offset) if overwrite else value - offset, True
        return _put_numbers(outputs, *quantize(value, outputs[0].x.dtype, overwrite=overwrite))
    if len(outputs) == 1:
        return _put(outputs[0], value_BFSHD)
    for slots, part in zip(outputs, value_BFSHD.split([slots.x.shape[3] for slots in outputs], 3), strict=True):
        _put(slots, part)


def _put_quantized(outputs: SlotsByHeads, pieces: QuantizedPieces, number: int) -> None:
    """Writes k or v, for number 0 or 1, that were quantized before."""
    numbers = torch.cat([as_bits(piece[number]) for piece in pieces.numbers], 2)
    _put_numbers(outputs, numbers, torch.cat([piece[number] for piece in pieces.scales], 2))


def _put_numbers(outputs: SlotsByHeads, numbers_BFSHD: Tensor, scales_BFSH: Tensor) -> None:
    if len(outputs) == 1:
        return _put_both(outputs[0], as_bits(numbers_BFSHD), scales_BFSH)
    heads = [slots.x.shape[3] for slots in outputs]
    parts = zip(outputs, as_bits(numbers_BFSHD).split(heads, 3), scales_BFSH.split(heads, 3), strict=True)
    for slots, numbers, scales in parts:
        _put_both(slots, numbers, scales)


def _put_both(slots: Slots, numbers_BFSHD: Tensor, scales_BFSH: Tensor) -> None:
    assert slots.scales is not None, "all slots have scales"
    if slots.slots_F is None:
        slots.bits.copy_(numbers_BFSHD)
        slots.scales.copy_(scales_BFSH)
    else:
        slots.bits.index_copy_(1, slots.slots_F, numbers_BFSHD)
        slots.scales.index_copy_(1, slots.slots_F, scales_BFSH)


def _put(slots: Slots, value_BFSHD: Tensor) -> None:
    """Writes heads as they are."""
    if slots.slots_F is None:
        slots.x.copy_(value_BFSHD)
    elif slots.memory is not None:
        slots.memory.copy_(value_BFSHD)
    else:
        slots.x.index_copy_(1, slots.slots_F, value_BFSHD)


def split_tokens(x_BFSHD: Tensor, pieces: Sequence[Tensor]) -> None:
    """Copies every rank's tokens of each frame into that rank's piece, (B, F, s_r, H, d)."""
    for piece, part in zip(pieces, x_BFSHD.split([piece.shape[2] for piece in pieces], 2), strict=True):
        piece.copy_(part)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Computes GELU, in its tanh form, of a linear layer."""
    return functional.gelu(functional.linear(x, weight, bias), approximate="tanh")


def attention(q_BTHD: Tensor, k_BLHD: Tensor, v_BLHD: Tensor) -> Tensor:
    """Computes softmax(q·kᵀ/√d)·v, (B, T, H, d). The order of the keys does not matter."""
    q, k, v = (x.transpose(1, 2) for x in (q_BTHD, k_BLHD, v_BLHD))
    return functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def attention_lse(q_BTHD: Tensor, k_BLHD: Tensor, v_BLHD: Tensor) -> Partial:
    """Computes attention, (B, T, H, d), with the log-sum-exp of its scores, (B, T, H), so that parts can be merged.

    Without keys the results are zeros and -inf.
    """
    q, k, v = (wide(x) for x in (q_BTHD, k_BLHD, v_BLHD))
    scores = torch.einsum("bthd,blhd->bthl", q, k) * q.shape[-1] ** -0.5
    return torch.einsum("bthl,blhd->bthd", scores.softmax(-1), v).to(q_BTHD.dtype), scores.logsumexp(-1)


def rotated(k_BLHD: Tensor, rotate_on_read: RotateOnRead, first: int = 0) -> Tensor:
    """Rotates keys by the time position of their slot. Row 0 of `k_BLHD` is row `first` of the ring."""
    slots = torch.arange(first, first + k_BLHD.shape[1], device=k_BLHD.device) // rotate_on_read.tokens
    cos, sin = rotate_on_read.table[slots].unbind(1)
    width = 2 * cos.shape[-1]
    return torch.cat([rotate(k_BLHD[..., :width], cos, sin), k_BLHD[..., width:]], -1)


def ranges(keys: Keys) -> list[tuple[Tensor, Tensor]]:
    """Returns the keys, rotated, and the values of every range that is not empty."""
    if keys.rotate_on_read is None:
        return keys.plain
    parts = []
    for first, stop in keys.rows:
        if stop > first:
            parts.append((rotated(keys.k[:, first:stop], keys.rotate_on_read, first), keys.v[:, first:stop]))
    return parts


def by_rows(attend: Callable[[Tensor, Keys], Partial], q_BTHD: Tensor, keys: Keys) -> Partial:
    """Attends by the heads that follow each other and read the same rows.

    Args:
        attend: attends heads that read the same rows.
        q_BTHD: the queries.
        keys: keys and values, and the ranges of rows that each head attends.

    Returns:
        The output, (B, T, H, d), and its log-sum-exp, (B, T, H).
    """
    groups = keys.by_rows
    queries = q_BTHD.split([group.k.shape[2] for group in groups], 2)
    outputs, lses = zip(*map(attend, queries, groups), strict=True)
    return torch.cat(outputs, 2), torch.cat(lses, 2)


def by_bands(attend: Callable[[Tensor, Keys], Partial], q_BTHD: Tensor, keys: Keys) -> Partial:
    """Attends band by band.

    Args:
        attend: attends queries that see all of their keys.
        q_BTHD: the queries, frame by frame.
        keys: keys and values, and the tokens of a slot that the queries of each band see.

    Returns:
        The output, (B, T, H, d), and its log-sum-exp, (B, T, H).
    """
    bands = keys.bands
    assert bands is not None, "keys that all queries see are attended at once"
    q_BFQHD = q_BTHD.unflatten(1, (-1, bands.frame_queries))
    outputs, lses = [], []
    for (first, stop), seen in zip(bands.queries, bands.keys, strict=True):
        q = q_BFQHD[:, :, first:stop]
        output, lse = attend(q.flatten(1, 2), _of_band(keys, *seen))
        outputs.append(output.unflatten(1, q.shape[1:3]))
        lses.append(lse.unflatten(1, q.shape[1:3]))
    return torch.cat(outputs, 2).flatten(1, 2), torch.cat(lses, 2).flatten(1, 2)


def _of_band(keys: Keys, first: int, stop: int) -> Keys:
    """Copies of the tokens [first, stop) of each slot that is read, for queries that see these alone."""
    assert keys.bands is not None, "keys that are seen whole need no copy"
    tokens, rotate_on_read = keys.bands.slot_tokens, keys.rotate_on_read
    slots = [(a // tokens, b // tokens) for a, b in keys.rows if b > a and stop > first]

    def taken(x: Tensor, axis: int) -> Tensor:
        parts = [x.narrow(axis, a, b - a) for a, b in slots]
        return parts[0] if len(parts) == 1 else torch.cat(parts, axis) if parts else x.narrow(axis, 0, 0)

    def of_slots(x: Tensor) -> Tensor:
        return taken(x.unflatten(1, (-1, tokens))[:, :, first:stop], 1).flatten(1, 2)

    k_scales, v_scales = (None if x is None else of_slots(x) for x in (keys.k_scales, keys.v_scales))
    if rotate_on_read is not None:
        rotate_on_read = RotateOnRead(taken(rotate_on_read.table, 0), stop - first) if slots else None
    k, v = of_slots(keys.k), of_slots(keys.v)
    return Keys(k, v, rotate_on_read=rotate_on_read, k_scales=k_scales, v_scales=v_scales)


def merge(parts: Sequence[Partial]) -> Partial:
    """Merges attention over disjoint sets of keys into attention over their union, n-way, by log-sum-exp.

    A part without keys (log-sum-exp -inf) has weight 0. If no part has keys, the result is zeros and -inf.
    """
    outputs, lses = zip(*parts, strict=True)
    lse_NBTH = torch.stack(lses)
    largest = lse_NBTH.amax(0)
    largest = largest.masked_fill(largest == -torch.inf, 0.0)
    weights = torch.exp(lse_NBTH - largest).unsqueeze(-1)
    total = weights.sum(0)
    values = torch.stack(outputs).to(weights.dtype).masked_fill(weights == 0, 0.0)
    merged = (values * weights).sum(0) / total.masked_fill(total == 0, 1.0)
    return merged.to(outputs[0].dtype), total.squeeze(-1).log() + largest
