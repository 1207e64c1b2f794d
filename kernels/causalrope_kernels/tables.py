"""What every launcher needs: the device that it launches on, and small tables of integers there."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache

import torch
from torch import Tensor

Lines = tuple[tuple[int, ...], ...]


def launching_on(x: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the thread's current device, which need not be the tensors'."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


@lru_cache(maxsize=1024)
def on_device(lines: Lines, device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    """A table, made once; from pinned memory, since the host must not wait for the device."""
    table = torch.tensor(lines, dtype=dtype)
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table
