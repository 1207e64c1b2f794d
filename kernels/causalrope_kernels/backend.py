"""Which backend an operation runs on, chosen per call."""

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
INTERPRETER_HAS_BFLOAT16 = False  # Triton 3.9's rounds to it by cutting, and multiplies it as if it were of integers


def use_triton(backend: str, *tensors: Tensor | None) -> bool:
    """Whether Triton's kernel runs. "auto" takes it on CUDA wherever it can go: not in float64, and not where a
    gradient is wanted, since the kernels have no backward.

    Raises:
        ValueError: an unknown name, or "triton" where its kernel cannot go.
    """
    given = [x for x in tensors if x is not None]
    if backend == "auto":
        return TRITON and runs_triton(given[0].device) and obstacle(given) is None
    if backend not in ("triton", "torch"):
        raise ValueError(f"backend: expected auto, triton or torch, not {backend!r}")
    why = obstacle(given) if TRITON else "is not installed"
    if backend == "triton" and why is not None:
        raise ValueError(f"backend: triton {why}")
    return backend == "triton"


@cache
def runs_triton(device: torch.device) -> bool:
    """Whether Triton's kernels are what runs on a device if nothing is said: on GPUs from Ampere on."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 8


def interpreted() -> bool:
    """Whether kernels run on the CPU, by Triton's interpreter: as TRITON_INTERPRET stood when they were first used."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def obstacle(tensors: list[Tensor]) -> str | None:
    """Why Triton's kernels cannot go with these, or None."""
    for x in tensors:
        if x.dtype not in DTYPES:
            return f"runs in {', '.join(str(d).removeprefix('torch.') for d in DTYPES)}, not in {x.dtype}"
        if not x.is_cuda and not interpreted():
            return f"runs on cuda, not on {x.device}, where TRITON_INTERPRET=1 would interpret it"
        if x.dtype == torch.bfloat16 and not x.is_cuda and not INTERPRETER_HAS_BFLOAT16:
            return "is interpreted in float32 and float16; in bfloat16 the interpreter's numbers are wrong"
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return "has no backward, and a tensor here requires a gradient"
    return None
