"""The operations by name: what they are given is checked, a backend is chosen, and that one runs.

Shapes: B batch, T tokens, F frames (T = F·s), L keys, H heads, d head width, D = H·d.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from causalrope_kernels import check, reference
from causalrope_kernels.arguments import Affine, ByFrame, Norm, Pieces, SlotsByHeads, Source
from causalrope_kernels.backend import DTYPES, Backend, use_triton


def add_norm(
    x_BTD: Tensor, y_BTD: Tensor | None, gate: ByFrame | None, norm: Norm, backend: Backend = "auto"
) -> tuple[Tensor, Tensor]:
    """The residual x + y·gate (y as it is without a gate, x alone without y) and its LayerNorm, modulated by the
    token's frame or affine; both (B, T, D).

    Raises:
        ValueError: shapes, strides, dtypes or devices that do not fit, by the argument's name.
    """
    check.add_norm(x_BTD, y_BTD, gate, norm)
    if use_triton(backend, x_BTD, y_BTD, *_vectors(gate, norm)):
        from causalrope_kernels import add_norm_kernel as kernel

        return kernel.add_norm(x_BTD, y_BTD, gate, norm)
    return reference.add_norm(x_BTD, y_BTD, gate, norm)


def _vectors(gate: ByFrame | None, norm: Norm) -> list[Tensor]:
    given = [gate] if isinstance(norm, Affine) else [gate, norm.shift, norm.scale]
    tensors = [norm.weight, norm.bias] if isinstance(norm, Affine) else []
    for each in given:
        if each is not None:
            tensors += [each.time_FD, each.learned_D]
    return tensors


def rms_norm(x: Tensor, weight: Tensor, eps: float, backend: Backend = "auto") -> Tensor:
    """x / sqrt(mean(x²) + eps) · weight over the last axis.

    Raises:
        ValueError: a weight of another width, strides or devices that do not fit.
    """
    check.rms_norm(x, weight)
    if use_triton(backend, x, weight):
        from causalrope_kernels import rms_norm_kernel as kernel

        return kernel.rms_norm(x, weight, eps)
    return reference.rms_norm(x, weight, eps)


def norm_rope_store(
    source: Source, *, q: SlotsByHeads = (), k: SlotsByHeads = (), v: SlotsByHeads = (), backend: Backend = "auto"
) -> None:
    """Writes q, k, v, or those of them that have rooms, straight there; the heads go to the rooms in order.

    From a projection q and k are normed over all of D and rotated on the way; pieces are copied as they are.

    Raises:
        ValueError: rooms that do not hold just all of the heads, or a shape, stride, dtype or device that does not fit.
    """
    check.source(source)
    check.kv_slots(source, q=q, k=k, v=v)
    weights = () if isinstance(source, Pieces) else (source.q_weight, source.k_weight)
    if not use_triton(backend, source.like, *weights):
        return reference.norm_rope_store(source, q, k, v)
    from causalrope_kernels import norm_rope_store_kernel as kernel

    if isinstance(source, Pieces):
        kernel.store_pieces(source.pieces, q, k, v)
    else:
        kernel.store_projection(source, q, k, v)


def split_tokens(x_BFSHD: Tensor, pieces: Sequence[Tensor], backend: Backend = "auto") -> None:
    """Tokens of all ranks, side by side in every frame, into a piece a rank, (B, F, s_r, H, d): the way back.

    Raises:
        ValueError: pieces that do not hold just all of the tokens, or are of another shape, dtype or device.
    """
    check.split(x_BFSHD, pieces)
    if not use_triton(backend, x_BFSHD):
        return reference.split_tokens(x_BFSHD, pieces)
    from causalrope_kernels import norm_rope_store_kernel as kernel

    kernel.split_tokens(x_BFSHD, pieces)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor, backend: str = "auto") -> Tensor:
    """A linear layer and GELU in its tanh form. "auto" has cuBLASLt do both at once on CUDA, where the wide result then
    crosses memory once; "torch" does one after the other.

    Raises:
        ValueError: a weight or bias of another width, an unknown backend.
    """
    check.linear_gelu(x, weight, bias)
    if backend not in ("auto", "torch"):
        raise ValueError(f"backend: expected auto or torch, not {backend!r}")
    wants_gradient = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, weight, bias))
    fused = x.is_cuda and x.dtype == weight.dtype and x.dtype in DTYPES
    if backend == "auto" and fused and not wants_gradient:
        rows = torch.ops.aten._addmm_activation(bias, x.flatten(0, -2), weight.t(), use_gelu=True)
        return rows.unflatten(0, x.shape[:-1])
    return reference.linear_gelu(x, weight, bias)
