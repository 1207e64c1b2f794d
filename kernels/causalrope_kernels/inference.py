"""The operations by torch where no gradient is needed: few calls, in place where the caller allows it.

`reference` defines the results. Half precision is computed in float32. The residual may be in float32 beside
projections in half precision, as it is on a CPU.

Shapes: B batch, T tokens, F frames (T = F·s), H heads, d head width, D = H·d, N which of q and k.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

from causalrope_kernels import reference
from causalrope_kernels.arguments import Affine, Norm, Projection, SlotsByHeads, Source, as_complex
from causalrope_kernels.backend import DTYPES
from causalrope_kernels.reference import by_frame, put_heads, wide

FEW_PRODUCTS = 1 << 20  # below so many multiplications a call of oneDNN takes longer than torch's own


def add_norm(
    x_BTD: Tensor, y_BTD: Tensor | None, gate: Tensor | None, norm: Norm, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Computes x + y·gate and its LayerNorm; see `operations.add_norm`, which checks the arguments."""
    if out is None or x_BTD.dtype.itemsize < 4:  # the sum in half precision is rounded after it was normed
        total, normed = reference.add_norm(x_BTD, y_BTD, gate, norm)
        return (total, normed) if out is None else (x_BTD.copy_(total), out.copy_(normed))
    if y_BTD is not None:
        if gate is None:
            x_BTD.add_(y_BTD)
        elif gate.shape[:-1] == (1,):
            x_BTD.addcmul_(y_BTD, gate)
        else:
            by_frame(x_BTD, gate).addcmul_(by_frame(y_BTD, gate), gate.unsqueeze(-2))
    if isinstance(norm, Affine):
        weight, bias = norm.weight, norm.bias
        if weight.dtype != x_BTD.dtype:
            weight, bias = weight.to(x_BTD.dtype), bias.to(x_BTD.dtype)
        normed = torch.layer_norm(x_BTD, weight.shape, weight, bias, norm.eps)
        return x_BTD, normed if normed.dtype == out.dtype else out.copy_(normed)
    ones, zeros = _unit(
        x_BTD.shape[-1], x_BTD.dtype, x_BTD.device
    )  # without weights torch takes twice as long on a CPU
    normed = by_frame(torch.layer_norm(x_BTD, ones.shape, ones, zeros, norm.eps), norm.shift)
    torch.addcmul(norm.shift.unsqueeze(-2), normed, norm.factor.unsqueeze(-2), out=by_frame(out, norm.shift))
    return x_BTD, out


def rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor | None = None) -> Tensor:
    """Computes the RMSNorm of the last axis; see `operations.rms_norm`, which checks the arguments."""
    wide_x = wide(x)
    normed = wide_x * _inverse_rms(wide_x, eps)
    if out is None or out.dtype != normed.dtype:
        normed = normed.mul_(weight)
        return normed.to(x.dtype) if out is None else out.copy_(normed)
    return torch.mul(normed, weight, out=out)


def norm_rope_store(
    source: Source,
    q: SlotsByHeads = (),
    k: SlotsByHeads = (),
    v: SlotsByHeads = (),
    k_offset: Tensor | None = None,
) -> None:
    """Writes q, k and v to their slots; see `operations.norm_rope_store`, which checks the arguments."""
    if not isinstance(source, Projection):
        return reference.norm_rope_store(source, q, k, v, k_offset)
    shape = batch, frames, tokens, heads, width = source.shape
    dim, first, count = heads * width, 0 if q else 1, bool(q) + bool(k)  # of q and k
    if count:
        qk_BFSN = source.qkv_BFSN[..., first * dim : (first + count) * dim]
        qk_BFSND = wide(qk_BFSN).view(batch, frames, tokens, count, dim)
        # channel pairs are complex numbers, so that one product rotates by the angles and divides by the norm
        factor = source.rotation.complex_TNE[:, first : first + count].view(frames, tokens, count, -1)
        factor = (factor * _inverse_rms(qk_BFSND, source.eps)).unsqueeze(-2)
        both = ((q, source.q_weight), (k, source.k_weight))[first : first + count]
        for number, (outputs, weight) in enumerate(both):
            pairs = as_complex((qk_BFSND[..., number, :] * weight).view(shape))
            offset = k_offset if first + number else None
            _put_product(outputs, pairs, factor[..., number, :, :], source.like.dtype, offset)
    if v:
        put_heads(v, source.qkv_BFSN[..., 2 * dim :].view(shape))


def _put_product(
    outputs: SlotsByHeads, pairs: Tensor, factor: Tensor, dtype: torch.dtype, offset: Tensor | None
) -> None:
    """Writes the product of complex numbers, (B, F, s, H, d/2), to the slots of all heads."""
    out = outputs[0].pairs if len(outputs) == 1 and dtype.itemsize >= 4 else None
    if out is None:
        value = torch.view_as_real(pairs * factor).flatten(-2)
        rounded = value.to(dtype) if outputs[0].scales is None else value  # quantizing rounds once
        put_heads(outputs, rounded, offset, overwrite=True)
    else:
        torch.mul(pairs, factor, out=out)


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    """One over the root mean square of the last axis, which is kept with size 1."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return torch.addcmul(_scalar(eps, x.dtype, x.device), norm, norm, value=1 / x.shape[-1]).rsqrt_()


@cache
def _unit(width: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """The weight and the bias of a norm that has none."""
    return torch.ones(width, dtype=dtype, device=device), torch.zeros(width, dtype=dtype, device=device)


@cache
def _scalar(value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(value, dtype=dtype, device=device)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Computes a linear layer; on a CPU by oneDNN, which is up to twice as fast in float32 as what torch calls."""
    return settled_linear(weight, bias)(x)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Computes GELU, in its tanh form, of a linear layer, by one call of oneDNN or cuBLASLt where there is one."""
    return settled_linear(weight, bias, gelu=True)(x)


def settled_linear(
    weight: Tensor, bias: Tensor | None, gelu: bool = False, packed: bool = False
) -> Callable[[Tensor], Tensor]:
    """Returns the function that computes a linear layer, in the dtype of its weight.

    Args:
        weight: (N, K).
        bias: (N,), or None.
        gelu: whether GELU, in its tanh form, follows.
        packed: whether a copy of the weight in the layout of oneDNN's kernels may be made, which the function keeps.
            With few rows it saves oneDNN a tenth of its time.
    """
    dtype, plain = weight.dtype, _plain_linear(weight, gelu)
    if weight.device.type != "cpu" or not by_onednn(dtype):
        return lambda x: plain(x if x.dtype == dtype else x.to(dtype), weight, bias)
    kept = torch.ops.mkldnn._reorder_linear_weight(weight) if packed else weight
    few = FEW_PRODUCTS // max(1, weight.shape[0])
    pointwise, (after, form) = torch.ops.mkldnn._linear_pointwise.default, ("gelu", "tanh") if gelu else ("none", "")

    def compute(x: Tensor) -> Tensor:
        x = x if x.dtype == dtype else x.to(dtype)
        return plain(x, weight, bias) if x.numel() < few else pointwise(x, kept, bias, after, [], form)

    return compute


def _plain_linear(weight: Tensor, gelu: bool) -> Callable[..., Tensor]:
    """The function of x, weight and bias without oneDNN."""
    if not gelu:
        return functional.linear
    return linear_gelu_by_cublas if weight.is_cuda and weight.dtype in DTYPES else _linear_gelu


def _linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.ops.aten.gelu_(functional.linear(x, weight, bias), approximate="tanh")


def linear_gelu_by_cublas(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Computes the same in one call of cuBLASLt, which writes the wide result to memory once."""
    rows = torch.ops.aten._addmm_activation(bias, x.flatten(0, -2), weight.t(), use_gelu=True)
    return rows.view(*x.shape[:-1], len(weight))


@cache
def by_onednn(dtype: torch.dtype) -> bool:
    """Returns whether oneDNN computes linear layers of a dtype on this CPU at the speed of its instructions."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype == torch.float32
