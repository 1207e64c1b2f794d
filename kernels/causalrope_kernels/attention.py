"""Attention of the queries of a pass on the keys of a cache: one interface over several libraries.

On CUDA, `auto` uses the backend that was measured to be the fastest for the shape (`attention_choice`). On the CPU it
uses torch's attention.

Shapes: B batch, T queries, L keys, H heads, d head width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from causalrope_kernels import attention_choice, check_attention, reference
from causalrope_kernels.arguments import Keys
from causalrope_kernels.attention_libraries import LIBRARIES, by_torch
from causalrope_kernels.backend import needs_gradient, obstacle, use_triton
from causalrope_kernels.quantized_attention import by_blocks
from causalrope_kernels.reference import Partial

ATTENTION_BACKENDS = ("auto", "torch", "triton", *LIBRARIES)


def attention(q_BTHD: Tensor, keys: Keys, backend: str = "auto", *, reuse_q: bool = False) -> Tensor:
    """Computes softmax(q·kᵀ/√d)·v, where every query attends every key. The order of the keys does not matter.

    Args:
        q_BTHD: the queries.
        keys: keys and values, and the ranges of rows that are attended.
        backend: one of `ATTENTION_BACKENDS`. "torch" is torch's attention for the device, and the only one with a
            gradient.
        reuse_q: whether the result may be written over the queries.

    Returns:
        What the queries attend, (B, T, H, d).

    Raises:
        ValueError: a shape, stride, dtype or device does not fit, or the backend is unknown, not installed or cannot
            run on these tensors.
    """
    check_attention.attention(q_BTHD, keys)
    return attention_by(choose(backend, q_BTHD, keys), q_BTHD, keys, reuse_q=reuse_q)


def attention_parts(q_BTHD: Tensor, keys: Keys, backend: str = "auto") -> list[Partial]:
    """Computes attention over disjoint parts of the keys, to be combined by `merge`.

    A library makes one part of every range, or one in all where heads or queries read different rows; the Triton kernel
    makes some shares of all ranges.

    Args:
        q_BTHD: the queries.
        keys: keys and values, and the ranges of rows that are attended.
        backend: one of `ATTENTION_BACKENDS`.

    Returns:
        For every part the output, (B, T, H, d), and its log-sum-exp, (B, T, H): zeros and -inf where there is no key.

    Raises:
        ValueError: as `attention`.
    """
    check_attention.attention(q_BTHD, keys)
    return parts_by(choose(backend, q_BTHD, keys), q_BTHD, keys)


def attention_by(chosen: str, q_BTHD: Tensor, keys: Keys, *, reuse_q: bool = False) -> Tensor:
    """Computes `attention` by the backend that `choose` returned, without checks."""
    if chosen == "torch" and keys.one_part:
        return reference.attention(q_BTHD, *reference.ranges(keys)[0])
    parts = parts_by(chosen, q_BTHD, keys, reuse_q=reuse_q)
    return parts[0][0] if len(parts) == 1 else merge(parts)[0]


def parts_by(chosen: str, q_BTHD: Tensor, keys: Keys, *, reuse_q: bool = False) -> list[Partial]:
    """Computes `attention_parts` by the backend that `choose` returned, without checks; at least one part."""
    if chosen == "triton":
        from causalrope_kernels.attention_launch import attend

        return attend(q_BTHD, keys, reuse_q=reuse_q)
    if keys.head_ranges is not None and q_BTHD.numel():
        return [reference.by_rows(lambda q, own: merge(parts_by(chosen, q, own)), q_BTHD, keys)]
    if keys.bands is not None and q_BTHD.numel():
        return [reference.by_bands(lambda q, own: merge(parts_by(chosen, q, own)), q_BTHD, keys)]
    if keys.k_scales is not None and q_BTHD.numel():
        return [by_blocks(q_BTHD, keys)]
    run = by_torch if chosen == "torch" else LIBRARIES[chosen].run
    if needs_gradient(q_BTHD, keys.k, keys.v):
        run = reference.attention_lse  # the log-sum-exp of torch's kernels has no gradient
    parts = [run(q_BTHD, k, v) for k, v in reference.ranges(keys)] if q_BTHD.numel() else []
    if not parts:
        nothing = keys.k[:, :0]
        output, lse = reference.attention_lse(q_BTHD, nothing, nothing)
        return [(output.contiguous(), lse)]
    return parts


def merge(parts: Sequence[Partial], backend: str = "auto") -> Partial:
    """Merges attention over disjoint sets of keys into attention over their union, n-way, by log-sum-exp.

    A part without keys (log-sum-exp -inf) has weight 0. If no part has keys, the result is zeros and -inf.

    Args:
        parts: the outputs, (B, T, H, d), with their log-sum-exps, (B, T, H).
        backend: "auto", "torch" or "triton".

    Returns:
        The output over all keys, (B, T, H, d), and its log-sum-exp, (B, T, H).

    Raises:
        ValueError: there are no parts, or they differ in shape, dtype or device.
    """
    check_attention.parts(parts)
    if len(parts) == 1:
        return parts[0]
    if use_triton(backend, *(output for output, _ in parts)) and not any(lse.requires_grad for _, lse in parts):
        from causalrope_kernels import merge_kernel as kernel

        return kernel.merge(parts)
    return reference.merge(parts)


def choose(backend: str, q_BTHD: Tensor, keys: Keys) -> str:
    """Returns the backend that runs: "torch", "triton" or one of `LIBRARIES`."""
    if backend not in ATTENTION_BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(ATTENTION_BACKENDS)}, not {backend!r}")
    if backend in LIBRARIES:
        why = LIBRARIES[backend].obstacle(q_BTHD)
        if keys.k_scales is not None:
            why = f"attends keys in the dtype of the queries, not in {keys.k.dtype}"
        if why is not None:
            raise ValueError(f"backend: {backend} {why}")
        return backend
    if backend == "auto":
        return attention_choice.choose(q_BTHD, keys)
    read = (keys.k, keys.v) if keys.k_scales is None else (keys.k_scales, keys.v_scales)
    return "triton" if use_triton(backend, q_BTHD, *read) else "torch"


def attention_obstacle(backend: str, device: torch.device) -> str | None:
    """Says before a stream starts why a backend cannot run on a device.

    Args:
        backend: one of `ATTENTION_BACKENDS`.
        device: where the queries will live.

    Returns:
        The reason, as a phrase that follows the backend's name, or None if the backend can run.
    """
    example = torch.empty(1, 1, 1, 64, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32, device=device)
    if backend in LIBRARIES:
        return LIBRARIES[backend].obstacle(example)
    return obstacle([example]) if backend == "triton" else None
