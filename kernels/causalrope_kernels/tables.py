"""Helpers of every kernel launcher: the current device, and small tables of integers on it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache

import torch
from torch import Tensor

Lines = tuple[tuple[int, ...], ...]


def launching_on(x: Tensor) -> AbstractContextManager[object]:
    """Returns a context in which the device of `x` is current: Triton launches on the thread's current device."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


@lru_cache(maxsize=1024)
def on_device(lines: Lines, device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    """Returns a table on a device, copied once from pinned memory, so that the host never waits for the device."""
    table = torch.tensor(lines, dtype=dtype)
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table
