"""What kernels read: small tables of integers on a device, and pointers."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

ALIGNMENT = 16  # bytes; Triton compiles another binary for pointers that these do not divide
Lines = tuple[tuple[int, ...], ...]


@cache
def on_device(lines: Lines, device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    """Returns a table on a device, copied once from pinned memory, so that the host never waits for the device.

    It is never freed, since a captured graph may read it. There are a few for each shape, of some kilobytes.
    """
    table = torch.tensor(lines, dtype=dtype)
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table


def is_aligned(x: Tensor) -> bool:
    """Returns whether Triton may take the pointer of a tensor for an aligned one."""
    return x.data_ptr() % ALIGNMENT == 0
