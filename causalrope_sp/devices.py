"""Copies from the host to a device that do not block the host."""

from __future__ import annotations

import torch
from torch import Tensor


def send(x: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Returns `x` on `device`.

    Args:
        x: the tensor. It is copied to a CUDA device from pinned memory, in the order of the current CUDA stream.
        device: where the result lives.
        dtype: of the result; None keeps that of `x`.
    """
    x = x if dtype is None else x.to(dtype=dtype)
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" and not x.is_cuda else x.to(device)
