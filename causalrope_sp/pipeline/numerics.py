"""Keeps a caller's global settings of torch out of a pipeline: its default dtype and its autocast.

A stream runs between two of the caller's own steps, so the settings are the library's only while the library works.
Autocast is a setting of the thread. The default dtype is one of the process: while the library works, the
caller's other threads see float32 too, and must not set another.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TypeVar

import torch

T = TypeVar("T")


@contextmanager
def own_numerics() -> Iterator[None]:
    """Sets float32 as the process's default dtype and turns this thread's autocast off; restores both at the end."""
    before = torch.get_default_dtype()
    with ExitStack() as stack:
        stack.callback(torch.set_default_dtype, before)
        torch.set_default_dtype(torch.float32)
        for kind in ("cpu", "cuda"):
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield
