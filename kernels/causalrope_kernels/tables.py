"""Small tables of integers on a device, which kernels read."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

Lines = tuple[tuple[int, ...], ...]


@cache
def on_device(lines: Lines, device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    """Returns a table on a device, copied once from pinned memory, so that the host never waits for the device.

    It is never freed, since a captured graph may read it. There are a few for each shape, of some kilobytes.
    """
    table = torch.tensor(lines, dtype=dtype)
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table
