"""The operations by torch where no gradient is needed: few calls, in place where the caller allows it.

`reference` defines the results. Half precision is computed in float32. The residual may be in float32 beside
projections in half precision, as it is on a CPU.

Shapes: B batch, T tokens, F frames (T = F·s), H heads, d head width, D = H·d, N which of q and k.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

from causalrope_kernels import reference
from causalrope_kernels.arguments import Affine, Norm, Projection, SlotsByHeads, Source
from causalrope_kernels.backend import DTYPES
from causalrope_kernels.reference import by_frame, put, wide

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
        else:
            by_frame(x_BTD, gate).addcmul_(by_frame(y_BTD, gate), gate.unsqueeze(-2))
    dim = x_BTD.shape[-1:]
    if isinstance(norm, Affine):
        normed = torch.layer_norm(x_BTD, dim, norm.weight.to(x_BTD.dtype), norm.bias.to(x_BTD.dtype), norm.eps)
        return x_BTD, normed if normed.dtype == out.dtype else out.copy_(normed)
    normed = by_frame(torch.layer_norm(x_BTD, dim, eps=norm.eps), norm.shift)
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


def norm_rope_store(source: Source, q: SlotsByHeads = (), k: SlotsByHeads = (), v: SlotsByHeads = ()) -> None:
    """Writes q, k and v to their slots; see `operations.norm_rope_store`, which checks the arguments."""
    if not isinstance(source, Projection):
        return reference.norm_rope_store(source, q, k, v)
    shape = source.shape
    first, stop = (0 if q else 1), (2 if k else 1)  # of q and k
    if first < stop:
        rotated = _normed_and_rotated(source, first, stop).to(source.like.dtype)
        for number, outputs in enumerate((q, k)[first:stop]):
            _put(outputs, rotated[:, :, number].view(shape))
    if v:
        _put(v, source.qkv_BFSN[..., 2 * shape[3] * shape[4] :].view(shape))


def _normed_and_rotated(projection: Projection, first: int, stop: int) -> Tensor:
    """q, k or both, normed over all of D and rotated, (B, T, N, H, d), in the dtype of the computation.

    Channel pairs are complex numbers, so that one product rotates by the angles and divides by the root mean square.
    """
    batch, frames, tokens, heads, width = projection.shape
    dim, count, tokens = heads * width, stop - first, frames * tokens
    x_BTND = wide(projection.qkv_BFSN[..., first * dim : stop * dim]).view(batch, tokens, count, dim)
    scaled = x_BTND.new_empty(batch, tokens, count, dim)
    for number, weight in enumerate((projection.q_weight, projection.k_weight)[first:stop]):
        torch.mul(x_BTND[:, :, number], weight, out=scaled[:, :, number])
    pairs = torch.view_as_complex(scaled.view(batch, tokens, count, heads, width // 2, 2))
    factor = projection.rotation.complex_TNE[:, first:stop] * _inverse_rms(x_BTND, projection.eps)
    return torch.view_as_real(pairs.mul_(factor.unsqueeze(-2))).view(batch, tokens, count, heads, width)


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    """One over the root mean square of the last axis, which is kept with size 1."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return norm.square_().mul_(1 / x.shape[-1]).add_(eps).rsqrt_()


def _put(outputs: SlotsByHeads, value_BFSHD: Tensor) -> None:
    """Writes heads to their slots, in order."""
    if len(outputs) == 1:
        return put(outputs[0], value_BFSHD)
    for slots, part in zip(outputs, value_BFSHD.split([slots.x.shape[3] for slots in outputs], 3), strict=True):
        put(slots, part)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Computes a linear layer; on a CPU by oneDNN, which is up to twice as fast in float32 as what torch calls."""
    if x.device.type == "cpu" and by_onednn(x.dtype) and x.numel() * len(weight) >= FEW_PRODUCTS:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return functional.linear(x, weight, bias)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Computes GELU, in its tanh form, of a linear layer, by one call of oneDNN or cuBLASLt where there is one."""
    if x.is_cuda and x.dtype in DTYPES:
        return linear_gelu_by_cublas(x, weight, bias)
    if x.device.type == "cpu" and by_onednn(x.dtype) and x.numel() * len(weight) >= FEW_PRODUCTS:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "gelu", [], "tanh")
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
