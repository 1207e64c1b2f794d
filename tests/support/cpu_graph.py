"""A stand-in for CUDA graphs on the CPU: the operators, collectives and kernels of a function are recorded, and a
replay runs them on the same tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from causalrope_kernels.launch import Kernel
from tests.support.observed_launches import launch, observed

UNWRITTEN = {"aten::empty", "aten::new_empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty_strided"}


class RecordedGraph(TorchDispatchMode):
    """Records every operator, collective and Triton kernel that runs inside the context."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.calls: list[Callable[[], object]] = []
        self._launching = False  # what the interpreter of a kernel does is no operator of the function

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func._schema.name
        if self._launching:
            return out
        self.names.append(name)
        written = any(each.alias_info and each.alias_info.is_write for each in func._schema.returns)
        if name.startswith("c10d::"):
            self.calls.append(lambda: _wait(func(*args, **kwargs)))
        elif written:
            self.calls.append(lambda: func(*args, **kwargs))
        elif name not in UNWRITTEN and not _memory(out) & _memory((args, kwargs)):  # a view is the same memory
            self.calls.append(lambda: _write(out, func(*args, **kwargs)))
        return out

    def launch(self, kernel: Kernel, *args: Any, **options: Any) -> None:
        """Launches a Triton kernel and records it."""
        self._launching = True
        try:
            launch(kernel, *args, **options)
        finally:
            self._launching = False
        self.names.append(kernel.function.__name__)
        self.calls.append(lambda: launch(kernel, *args, **options))

    def replay(self) -> None:
        """Runs what was recorded again; anything but a view is written where it was."""
        for call in self.calls:
            call()


def capture_on_cpu(run: Callable[[], Tensor]) -> tuple[RecordedGraph, Tensor]:
    """Captures a function as `CudaCapture` does. Unlike there, the function runs while it is captured."""
    graph = RecordedGraph()
    with graph, observed(graph.launch):
        output = run()
    return graph, output


def _write(to: Any, found: Any) -> None:
    for own, x in zip(_tensors(to), _tensors(found), strict=True):
        own.copy_(x)


def _wait(started: Any) -> None:
    (started[-1] if isinstance(started, tuple) else started).wait()


def _tensors(found: Any) -> list[Tensor]:
    """All tensors in a value."""
    return [x for x in tree_leaves(found) if isinstance(x, torch.Tensor)]


def _memory(found: Any) -> set[int]:
    """Where the memory of all tensors in a value begins."""
    return {x.untyped_storage().data_ptr() for x in _tensors(found)}
