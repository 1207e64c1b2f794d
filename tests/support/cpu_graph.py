"""A stand-in for CUDA graphs on the CPU: the operators of a function are recorded, and a replay runs them on the same
tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

UNWRITTEN = {"aten::empty", "aten::new_empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty_strided"}


class RecordedGraph(TorchDispatchMode):
    """Records every operator that runs inside the context."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    @property
    def names(self) -> list[str]:
        """The operators that were recorded, in order."""
        return [func._schema.name for func, *_ in self.calls]

    def replay(self) -> None:
        """Runs what was recorded again: a view is the same memory, and anything else is written where it was."""
        for func, args, kwargs, out in self.calls:
            written = any(each.alias_info and each.alias_info.is_write for each in func._schema.returns)
            if func._schema.name in UNWRITTEN or (not written and _memory(out) & _memory((args, kwargs))):
                continue
            found = func(*args, **kwargs)
            if not written:
                for to, x in zip(_tensors(out), _tensors(found), strict=True):
                    to.copy_(x)


def capture_on_cpu(run: Callable[[], Tensor]) -> tuple[RecordedGraph, Tensor]:
    """Captures a function as `capture_on_cuda` does. Unlike there, the function runs while it is captured."""
    graph = RecordedGraph()
    with graph:
        output = run()
    return graph, output


def _tensors(found: Any) -> list[Tensor]:
    """All tensors in a value."""
    return [x for x in tree_leaves(found) if isinstance(x, torch.Tensor)]


def _memory(found: Any) -> set[int]:
    """Where the memory of all tensors in a value begins."""
    return {x.untyped_storage().data_ptr() for x in _tensors(found)}
