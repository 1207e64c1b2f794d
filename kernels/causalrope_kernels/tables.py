"""Small tables of integers that a kernel reads on the device."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

Lines = tuple[tuple[int, ...], ...]


@lru_cache(maxsize=1024)
def on_device(lines: Lines, device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    """A table, made once; from pinned memory, since the host must not wait for the device."""
    table = torch.tensor(lines, dtype=dtype)
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table
