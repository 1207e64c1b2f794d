"""The choice between Triton and torch, made per call."""

from __future__ import annotations

import os
from functools import cache
from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor

Backend = Literal["auto", "triton", "torch"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TRITON = find_spec("triton") is not None
INTERPRETER_HAS_BFLOAT16 = False  # Triton 3.9's interpreter truncates to bfloat16 and multiplies it as integers


def use_triton(backend: str, *tensors: Tensor | None) -> bool:
    """Returns whether the Triton kernel of an operation runs.

    Args:
        backend: "auto", "triton" or "torch". "auto" uses Triton on CUDA, except in float64 and where a gradient is
            required, since the kernels have no backward.
        tensors: the arguments of the operation; None is skipped.

    Raises:
        ValueError: the name is unknown, or it is "triton" and the kernel cannot run on these tensors.
    """
    present = [x for x in tensors if x is not None]
    if backend == "auto":
        return TRITON and runs_triton(present[0].device) and obstacle(present) is None
    if backend not in ("triton", "torch"):
        raise ValueError(f"backend: expected auto, triton or torch, not {backend!r}")
    why = obstacle(present) if TRITON else "is not installed"
    if backend == "triton" and why is not None:
        raise ValueError(f"backend: triton {why}")
    return backend == "triton"


@cache
def runs_triton(device: torch.device) -> bool:
    """Returns whether "auto" uses Triton on a device: on GPUs of compute capability 8.0 (Ampere) and above."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 8


def interpreted() -> bool:
    """Returns whether TRITON_INTERPRET asks for Triton's interpreter, which runs kernels on the CPU.

    Triton itself reads the variable when a kernel is defined; a later change has no effect on that kernel.
    """
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def obstacle(tensors: list[Tensor]) -> str | None:
    """Returns why Triton's kernels cannot run on these tensors, as a phrase that follows "triton", or None."""
    for x in tensors:
        if x.dtype not in DTYPES:
            return f"runs in {', '.join(str(d).removeprefix('torch.') for d in DTYPES)}, not in {x.dtype}"
        if not x.is_cuda and not interpreted():
            return f"runs on cuda, not on {x.device}, where TRITON_INTERPRET=1 would interpret it"
        if x.dtype == torch.bfloat16 and not x.is_cuda and not INTERPRETER_HAS_BFLOAT16:
            return "is interpreted in float32 and float16; in bfloat16 the interpreter's numbers are wrong"
    if needs_gradient(*tensors):
        return "has no backward, and a tensor here requires a gradient"
    return None


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Returns whether an operation on these tensors must be differentiable."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
