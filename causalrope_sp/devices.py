"""From the host to a device, without the host waiting."""

from __future__ import annotations

import torch
from torch import Tensor


def send(x: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """`x` on `device`, as `dtype` if given. To CUDA it goes from pinned memory, in the stream's order."""
    x = x if dtype is None else x.to(dtype=dtype)
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" and not x.is_cuda else x.to(device)
