"""The public operations. Each checks its arguments, chooses a backend and runs it.

Shapes: B batch, T tokens, F frames (T = F·s), L keys, H heads, d head width, D = H·d.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor
from torch.nn import functional

from causalrope_kernels import check, check_quantized, inference, reference
from causalrope_kernels.arguments import Affine, Norm, Projection, SlotsByHeads, Source
from causalrope_kernels.backend import Backend, needs_gradient, use_triton


def add_norm(
    x_BTD: Tensor,
    y_BTD: Tensor | None,
    gate: Tensor | None,
    norm: Norm,
    out: Tensor | None = None,
    *,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Computes the residual x + y·gate and its LayerNorm, modulated by the token's frame or affine.

    Args:
        x_BTD: the residual.
        y_BTD: what is added to it, or None for nothing.
        gate: the factor of y by frame, (F, D) or (B, F, D), or None for 1. It needs y.
        norm: what follows the LayerNorm: `Modulation` or `Affine`.
        out: memory for the norm. With it the sum overwrites `x_BTD`, and no gradient is computed.
        backend: "auto", "triton" or "torch".

    Returns:
        The sum, which is `x_BTD` itself without y, and its norm, both (B, T, D).

    Raises:
        ValueError: a shape, stride, dtype or device does not fit; the message names the argument.
    """
    check.add_norm(x_BTD, y_BTD, gate, norm, out)
    vectors = (norm.weight, norm.bias) if isinstance(norm, Affine) else (norm.shift, norm.factor)
    if use_triton(backend, x_BTD, y_BTD, gate, *vectors):
        from causalrope_kernels import add_norm_kernel as kernel

        return kernel.add_norm(x_BTD, y_BTD, gate, norm, out)
    if needs_gradient(x_BTD, y_BTD, gate, *vectors):
        return reference.add_norm(x_BTD, y_BTD, gate, norm)
    return inference.add_norm(x_BTD, y_BTD, gate, norm, out)


def rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor | None = None, *, backend: Backend = "auto") -> Tensor:
    """Computes x / sqrt(mean(x²) + eps) · weight over the last axis.

    Args:
        x: (…, D).
        weight: (D,).
        eps: what is added to the mean square.
        out: memory for the result, which may be `x` itself; no gradient is computed then.
        backend: "auto", "triton" or "torch".

    Returns:
        The norm, of the shape and dtype of x.

    Raises:
        ValueError: the weight has another width, or a stride or device does not fit.
    """
    check.rms_norm(x, weight, out)
    if use_triton(backend, x, weight):
        from causalrope_kernels import rms_norm_kernel as kernel

        return kernel.rms_norm(x, weight, eps, out)
    if needs_gradient(x, weight):
        return reference.rms_norm(x, weight, eps)
    return inference.rms_norm(x, weight, eps, out)


def norm_rope_store(
    source: Source,
    *,
    q: SlotsByHeads = (),
    k: SlotsByHeads = (),
    v: SlotsByHeads = (),
    k_offset: Tensor | None = None,
    backend: Backend = "auto",
) -> None:
    """Writes q, k and v to their slots. Heads fill the `Slots` of a list in order.

    From a `Projection`, q and k are normed over all of D and rotated as they are written, and keys and values are
    quantized as they are written to slots with scales. `Pieces` and `QuantizedPieces` are copied.

    Args:
        source: where q, k and v come from.
        q: where the queries go; empty to write none.
        k: where the keys go; empty to write none.
        v: where the values go; empty to write none.
        k_offset: what is subtracted from the keys of a `Projection` before they are quantized, (B, H, d); None for
            nothing, as it must be for other sources. Softmax does not see an offset that all keys of a query have in
            common.
        backend: "auto", "triton" or "torch".

    Raises:
        ValueError: the slots of q, k or v do not hold exactly H heads, or a shape, stride, dtype or device does not
            fit.
    """
    check.source(source)
    check.kv_slots(source, q=q, k=k, v=v)
    check_quantized.offset(k_offset, source, k)
    weights = (source.q_weight, source.k_weight) if isinstance(source, Projection) else ()
    if use_triton(backend, source.like, *weights):
        from causalrope_kernels import norm_rope_store_launch as kernel

        kernel.store(source, q, k, v, k_offset)
    elif needs_gradient(source.like, *weights):
        check_quantized.no_gradient(k, v)
        reference.norm_rope_store(source, q, k, v, k_offset)
    else:
        inference.norm_rope_store(source, q, k, v, k_offset)


def split_tokens(x_BFSHD: Tensor, pieces: Sequence[Tensor], backend: Backend = "auto") -> None:
    """Copies every rank's tokens of each frame into that rank's piece, to be sent back.

    Args:
        x_BFSHD: the tokens of all ranks, in order of rank in every frame.
        pieces: one tensor (B, F, s_r, H, d) per rank, parts of one buffer.
        backend: "auto", "triton" or "torch".

    Raises:
        ValueError: the pieces do not hold exactly S tokens, or differ from `x_BFSHD` in shape, dtype or device.
    """
    check.split(x_BFSHD, pieces)
    if not use_triton(backend, x_BFSHD):
        return reference.split_tokens(x_BFSHD, pieces)
    from causalrope_kernels import norm_rope_store_launch as kernel

    kernel.split_tokens(x_BFSHD, pieces)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Computes a linear layer.

    Args:
        x: (…, K).
        weight: (N, K).
        bias: (N,), or None.

    Returns:
        (…, N).

    Raises:
        ValueError: the weight or bias has another width or dtype.
    """
    check.linear(x, weight, bias)
    if needs_gradient(x, weight, bias):
        return functional.linear(x, weight, bias)
    return inference.linear(x, weight, bias)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor, backend: str = "auto") -> Tensor:
    """Computes GELU, in its tanh form, of a linear layer.

    Args:
        x: (…, K).
        weight: (N, K).
        bias: (N,).
        backend: "auto" computes both in one call, of cuBLASLt on CUDA and of oneDNN on a CPU, which writes the wide
            result to memory once; "torch" computes one after the other.

    Returns:
        (…, N).

    Raises:
        ValueError: the weight or bias has another width, or the backend is unknown.
    """
    check.linear(x, weight, bias)
    if backend not in ("auto", "torch"):
        raise ValueError(f"backend: expected auto or torch, not {backend!r}")
    if needs_gradient(x, weight, bias):
        return reference.linear_gelu(x, weight, bias)
    return inference.linear_gelu(x, weight, bias) if backend == "auto" else reference.linear_gelu(x, weight, bias)


def settled_linear(weight: Tensor, bias: Tensor | None, gelu: bool = False) -> Callable[[Tensor], Tensor]:
    """Returns the function that computes `linear`, or `linear_gelu`, of a tensor cast to the dtype of the weight.

    Args:
        weight: (N, K).
        bias: (N,), or None.
        gelu: whether GELU, in its tanh form, follows.
    """

    def compute(x: Tensor) -> Tensor:
        x = x.to(weight.dtype)
        if not gelu:
            return linear(x, weight, bias)
        assert bias is not None, "GELU follows a linear layer with a bias"
        return linear_gelu(x, weight, bias)

    return compute
