"""CUDA graphs of a stream's passes: one launch from Python a pass once the window slides.

A pass of one kind differs from the next in numbers alone: tokens, modulation, positions in time, slots and bounds. A
graph reads them from tensors of its own, into which the current ones are copied before every replay. A kind is captured
when it returns in a later chunk, so a window that fills runs eagerly, and attention keeps the backend that was chosen
for the keys of the kind.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from causalrope_kernels.launch import on

MOST_GRAPHS = 32  # of a stream; later kinds run eagerly
_log = logging.getLogger(__name__)


class Graph(Protocol):
    """A captured function, such as `torch.cuda.CUDAGraph` has it."""

    def replay(self) -> None:
        """Runs the function again on the same tensors."""


Capture = Callable[[Callable[[], Tensor]], tuple[Graph, Tensor]]


class CudaCapture:
    """Captures functions in CUDA graphs of one device, which share their memory.

    Args:
        device: the GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._pool = device, torch.cuda.graph_pool_handle()

    def __call__(self, run: Callable[[], Tensor]) -> tuple[Graph, Tensor]:
        """Captures a function, which was run before, so that nothing is compiled, measured or loaded now.

        Args:
            run: the function.

        Returns:
            The graph, and the output tensor, which a replay writes and the next replay of another graph overwrites.
        """
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self._device):
            stream = torch.cuda.Stream()
            # another thread may decode at the same time
            with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
                output = run()
        return graph, output


def stream_graphs(device: torch.device) -> PassGraphs | None:
    """Returns the graphs of a stream on a device; None where there are none, as on a CPU."""
    return PassGraphs(CudaCapture(device), device) if device.type == "cuda" else None


@dataclass(frozen=True)
class _Captured:
    graph: Graph
    inputs: tuple[Tensor, ...]
    output: Tensor


class PassGraphs:
    """The graphs of one stream.

    Args:
        capture: captures a function; a `CudaCapture`, or a stand-in in tests.
        device: where the stream computes.
    """

    def __init__(self, capture: Capture, device: torch.device) -> None:
        self._capture, self._device = capture, device
        self._graphs: dict[Hashable, _Captured] = {}
        self._seen: dict[Hashable, int] = {}  # the chunk in which a kind was first seen
        self._failed = False
        self.replays = 0

    def run(
        self,
        kind: Hashable,
        chunk: int,
        inputs: Sequence[Tensor],
        forward: Callable[[Sequence[Tensor]], Tensor],
        undo: Callable[[], None],
    ) -> Tensor:
        """Runs a pass, by a graph if its kind was captured.

        Args:
            kind: what a graph depends on besides the numbers in `inputs`.
            chunk: the number of the chunk that is denoised.
            inputs: the tensors that differ between passes of the kind.
            forward: computes the pass from such tensors.
            undo: restores what the pass overwrote, so that the pass may run again.

        Returns:
            The output of the pass.
        """
        found = self._graphs.get(kind)
        if found is not None:
            self._copy(inputs, found.inputs)
            with on(self._device):
                found.graph.replay()
            self.replays += 1
            return found.output.clone()
        output = forward(inputs)
        if chunk > self._seen.setdefault(kind, chunk) and len(self._graphs) < MOST_GRAPHS and not self._failed:
            self._try(kind, inputs, forward, undo, output)
        return output

    def _try(
        self,
        kind: Hashable,
        inputs: Sequence[Tensor],
        forward: Callable[[Sequence[Tensor]], Tensor],
        undo: Callable[[], None],
        eager: Tensor,
    ) -> None:
        """Captures a kind. A graph is kept only if its first replay gives what the eager pass gave."""
        own = tuple(x.clone() for x in inputs)
        undo()
        try:
            graph, output = self._capture(lambda: forward(own))
            undo()
            output.fill_(torch.nan)  # or a graph that holds nothing would leave what its capture computed
            with on(self._device):
                graph.replay()
            if not torch.allclose(output, eager, rtol=1e-2, atol=1e-2 * float(eager.abs().max())):
                raise RuntimeError("its output differs from that of the eager pass")
        except RuntimeError as error:
            self._failed = True
            undo()
            forward(inputs)  # what the eager pass wrote
            _log.warning("passes run without CUDA graphs: %s", str(error).splitlines()[0])
            return
        self._graphs[kind] = _Captured(graph, own, output)

    def fork(self) -> PassGraphs:
        """Returns graphs for another stream, which share nothing: a graph has the addresses of one cache."""
        return PassGraphs(self._capture, self._device)

    @staticmethod
    def _copy(inputs: Sequence[Tensor], own: Sequence[Tensor]) -> None:
        by_dtype: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
        for to, x in zip(own, inputs, strict=True):
            targets, sources = by_dtype.setdefault(x.dtype, ([], []))
            targets.append(to)
            sources.append(x)
        for targets, sources in by_dtype.values():
            torch._foreach_copy_(targets, sources)
