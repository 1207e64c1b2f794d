"""The torch truth of every operation, written to be read.

Shapes: B batch, T tokens, F frames (T = F·s), L keys, H heads, d head width, D = H·d. What a frame carries, (F, D),
may also differ by batch entry, (B, F, D).
Half-precision input is computed in float32, anything else in its own dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float32 if x.dtype in (torch.bfloat16, torch.float16) else x.dtype


def rotate(x_BTHD: Tensor, cos_TE: Tensor, sin_TE: Tensor, out: Tensor | None = None) -> Tensor:
    """Turns the channel pairs (2i, 2i+1) of every head by the token's angles, into `out` if given; E = d/2."""
    even, odd = x_BTHD.to(cos_TE.dtype).unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos_TE.unsqueeze(-2), sin_TE.unsqueeze(-2)
    turned = even * cos - odd * sin, even * sin + odd * cos
    if out is None:
        return torch.stack(turned, -1).flatten(-2).to(x_BTHD.dtype)
    for part, value in zip(out.unflatten(-1, (-1, 2)).unbind(-1), turned, strict=True):
        part.copy_(value)
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) · weight over the last axis."""
    return functional.rms_norm(x.to(_compute_dtype(x)), x.shape[-1:], weight.to(_compute_dtype(x)), eps).to(x.dtype)


@dataclass(frozen=True)
class Placement:
    """Where q, k, v of the heads [start, stop) go: views (B, T, stop - start, d), of a send buffer, say."""

    start: int
    stop: int
    q: Tensor
    k: Tensor
    v: Tensor


@dataclass(frozen=True)
class Projection:
    """q, k, v of a pass as the packed projection (B, T, 3·D) leaves them; norm and rotation are still to come."""

    qkv_BTD3: Tensor
    q_weight: Tensor
    k_weight: Tensor
    cos_TE: Tensor
    sin_TE: Tensor
    heads: int
    eps: float

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v as (B, T, H, d): q and k normed over all of D, then rotated."""
        q, k, v = self._normed()
        return rotate(q, self.cos_TE, self.sin_TE), rotate(k, self.cos_TE, self.sin_TE), v

    def write(self, placements: Sequence[Placement]) -> None:
        """The same numbers, each head straight to where it goes next."""
        q, k, v = self._normed()
        for place in placements:
            mine = slice(place.start, place.stop)
            rotate(q[:, :, mine], self.cos_TE, self.sin_TE, out=place.q)
            rotate(k[:, :, mine], self.cos_TE, self.sin_TE, out=place.k)
            place.v.copy_(v[:, :, mine])

    def _normed(self) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.qkv_BTD3.chunk(3, -1)
        q, k = rms_norm(q, self.q_weight, self.eps), rms_norm(k, self.k_weight, self.eps)
        q, k, v = (x.unflatten(-1, (self.heads, -1)) for x in (q, k, v))
        return q, k, v


def modulate(x_BTD: Tensor, shift_FD: Tensor, scale_FD: Tensor, eps: float) -> Tensor:
    """LayerNorm without weights, then x·(1 + scale) + shift with the shift and scale of the token's frame."""
    dtype = _compute_dtype(x_BTD)
    shift, scale = (m.to(dtype).unsqueeze(-2) for m in (shift_FD, scale_FD))
    x = functional.layer_norm(x_BTD.to(dtype), x_BTD.shape[-1:], eps=eps).unflatten(1, (scale.shape[-3], -1))
    return torch.addcmul(shift, x, 1 + scale).flatten(1, 2).to(x_BTD.dtype)


def gate_add(x_BTD: Tensor, y_BTD: Tensor, gate_FD: Tensor) -> Tensor:
    """The residual x + y·gate with the gate of the token's frame."""
    x, y, gate = (t.to(_compute_dtype(x_BTD)) for t in (x_BTD, y_BTD, gate_FD))
    y = y.unflatten(1, (gate.shape[-2], -1)) * gate.unsqueeze(-2)
    return (x + y.flatten(1, 2)).to(x_BTD.dtype)


def attention(q_BTHD: Tensor, k_BLHD: Tensor, v_BLHD: Tensor) -> Tensor:
    """Every query attends every key: softmax(q·kᵀ/√d)·v, (B, T, H, d). The order of the keys does not matter."""
    q, k, v = (x.transpose(1, 2) for x in (q_BTHD, k_BLHD, v_BLHD))
    return functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def attention_lse(q_BTHD: Tensor, k_BLHD: Tensor, v_BLHD: Tensor) -> tuple[Tensor, Tensor]:
    """Attention with the log-sum-exp of its scores, (B, T, H, d) and (B, T, H), so that parts can be merged.

    No keys at all give zeros and -inf.
    """
    dtype = _compute_dtype(q_BTHD)
    q, k, v = (x.to(dtype) for x in (q_BTHD, k_BLHD, v_BLHD))
    scores = torch.einsum("bthd,blhd->bthl", q, k) * q.shape[-1] ** -0.5
    lse = scores.logsumexp(-1)
    weights = torch.exp(scores - lse.unsqueeze(-1))
    return torch.einsum("bthl,blhd->bthd", weights, v).to(q_BTHD.dtype), lse


def merge(outputs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Attention over the union of disjoint key sets, from the attention over each: n-way, by log-sum-exp.

    Parts without any key (lse -inf) weigh nothing; if no part has one, the result is zeros and -inf.
    """
    lse_NBTH = torch.stack(tuple(lses))
    lse = lse_NBTH.logsumexp(0)
    weights = torch.exp(lse_NBTH - lse.masked_fill(lse == -torch.inf, 0.0)).unsqueeze(-1)
    merged = (torch.stack(tuple(outputs)).to(weights.dtype) * weights).sum(0)
    return merged.to(outputs[0].dtype), lse
