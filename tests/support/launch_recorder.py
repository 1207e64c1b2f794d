"""Records what a pass asks of a device: operators, collectives and Triton launches with the memory that they touch.

Tensors stay on the CPU, Triton is chosen as on a GPU, and a launch computes nothing, so results are undefined. Memory
that is alive before a pass is named by its address, memory that the pass allocates by its number: a graph's pool gives
the same addresses for the same allocations. Two passes that are recorded alike may be replays of one graph.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from causalrope_kernels import backend, inference
from causalrope_kernels.launch import Kernel
from causalrope_sp.distributed.communicator import Communicator
from tests.support.observed_launches import observed

# operators that ask the device, or copy from the host
WAITING = {"aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::is_nonzero", "aten::masked_select"}
COPYING = {"aten::lift_fresh", "aten::_pin_memory"}
READING = ("tolist", "numpy", "item", "cpu", "cuda", "pin_memory")  # methods, of which a CPU tensor calls no operator


class NotReadyError(AssertionError):
    """A pass cannot be captured."""


class Recorder(TorchDispatchMode):
    """Records the events inside the context."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[Any] = []
        self._allocated: dict[int, int] = {}  # the number of the allocation that an address belongs to
        self._alive: list[tuple[str, StorageWeakRef]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func._schema.name, kwargs or {}
        if name in WAITING | COPYING:
            raise NotReadyError(f"{name} {'waits for the device' if name in WAITING else 'copies from the host'}")
        given = self._described((args, kwargs))
        out = func(*args, **kwargs)
        known = {_address(x) for x in _tensors((args, kwargs))}
        for x in _tensors(out):
            if x.numel() and _address(x) not in known:
                self._allocated[_address(x)] = len(self._alive)
                self._alive.append((name, StorageWeakRef(x.untyped_storage())))
        self.events.append((name, given, self._described(out)))
        return out

    def launch(self, kernel: Kernel, grid: Any, tensors: Any, numbers: Any, constants: Any, **options: int) -> None:
        """Records a launch, which computes nothing."""
        given = self._described(tensors)
        self.events.append((kernel.function.__name__, grid, given, numbers, constants, tuple(options.items())))

    def outliving(self, output: Tensor) -> list[str]:
        """Returns the operators whose new memory is alive after the pass, besides that of its output."""
        own = StorageWeakRef(output.untyped_storage())
        return [name for name, memory in self._alive if not memory.expired() and memory != own]

    def _described(self, found: Any) -> Any:
        return tree_map(self._memory_of, found)

    def _memory_of(self, x: Any) -> Any:
        if not isinstance(x, torch.Tensor):
            return x if isinstance(x, int | float | str | None) else type(x).__name__
        address = _address(x)
        memory = f"new {self._allocated[address]}" if address in self._allocated else f"held {address}"
        return memory, x.storage_offset(), tuple(x.shape), x.stride(), x.dtype


class RecordedPasses:
    """In place of `PassGraphs`: every pass of a kind after the first one is recorded on the same inputs.

    Chunk 0 is left out: its passes are shorter than the fused ones that follow, for which send buffers grow.

    Args:
        communicator: the ranks that share a pass, or None.
    """

    def __init__(self, communicator: Communicator | None = None) -> None:
        self._communicator = communicator
        self._inputs: dict[Hashable, list[Tensor]] = {}
        self.records: dict[Hashable, list[list[Any]]] = {}
        self.refused: set[str] = set()

    def run(
        self,
        kind: Hashable,
        chunk: int,
        inputs: Sequence[Tensor],
        forward: Callable[[Sequence[Tensor]], Tensor],
        undo: Callable[[], None],
        obstacle: str | None = None,
    ) -> Tensor:
        """Runs a pass as `PassGraphs.run` does, and records it unless it is the first of its kind."""
        if chunk == 0:
            return forward(inputs)
        if kind not in self._inputs:
            self._inputs[kind], self.records[kind] = [x.clone() for x in inputs], []
            return forward(inputs)
        own = self._inputs[kind]
        for to, x in zip(own, inputs, strict=True):
            to.copy_(x)
        capturing = nullcontext() if self._communicator is None else self._communicator.comm_stats.capturing()
        with capturing, recording() as recorder:
            output = forward(own)
        left = recorder.outliving(output)
        if left:
            raise NotReadyError(f"memory of {', '.join(left)} outlives the pass")
        self.records[kind].append(recorder.events)
        return output.clone()

    def refuse(self, why: str) -> None:
        """Notes a pass that is never captured."""
        self.refused.add(why)

    def check(self) -> list[int]:
        """Raises NotReadyError unless all passes of a kind were recorded alike; returns how many each kind has."""
        for records in self.records.values():
            first = next(iter(records), [])
            for record in records[1:]:
                for number, (one, other) in enumerate(zip(first, record, strict=False)):
                    if one != other:
                        raise NotReadyError(f"event {number} differs: {one}, {other}")
                if len(first) != len(record):
                    raise NotReadyError(f"{len(first)} events, {len(record)} later")
        return [len(records) for records in self.records.values()]


@contextmanager
def recording() -> Iterator[Recorder]:
    """Records what the body asks of the device."""
    recorder = Recorder()
    with ExitStack() as patches:
        patches.enter_context(observed(recorder.launch))
        for name in READING:
            patches.enter_context(patch.object(torch.Tensor, name, _refusing(name)))
        patches.enter_context(recorder)
        yield recorder


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Lets the operations choose what they choose on a GPU, for tensors on the CPU; launches compute nothing."""
    with ExitStack() as patches:
        patches.enter_context(patch.object(backend, "runs_triton", lambda device: True))
        patches.enter_context(patch.object(backend, "obstacle", lambda tensors: None))
        patches.enter_context(patch.object(inference, "by_onednn", lambda dtype: False))
        patches.enter_context(patch.object(inference, "linear_gelu", inference.linear_gelu_by_cublas))
        patches.enter_context(observed(lambda *args, **options: None))
        yield


def _refusing(name: str) -> Callable[..., Any]:
    def refuse(*args: Any, **options: Any) -> Any:
        raise NotReadyError(f"Tensor.{name} reads on the host, or copies")

    return refuse


def _tensors(found: Any) -> list[Tensor]:
    return [x for x in tree_leaves(found) if isinstance(x, torch.Tensor)]


def _address(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()
