"""CUDA graphs of a stream's passes: one launch from Python a pass once the window slides.

A pass of one kind differs from the next in numbers alone: tokens, modulation, positions in time, slots and bounds. A
graph reads them from tensors of its own, into which the current ones are copied before every replay. A kind is captured
when it returns in a later chunk, and attention keeps the backend that was chosen for the keys of the kind.

Ranks that share a pass make its collectives within the graph. They capture the same kinds in the same passes, and keep
a graph only if every rank could capture its own; a rank that runs a pass eagerly fits ranks that replay it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from causalrope_kernels.launch import on
from causalrope_sp.distributed.comm_stats import CapturedCollectives
from causalrope_sp.distributed.communicator import Communicator
from causalrope_sp.errors import first_line

MOST_GRAPHS = 64  # of a stream; later kinds run eagerly
_log = logging.getLogger(__name__)


class Graph(Protocol):
    """A captured function, such as `torch.cuda.CUDAGraph` has it."""

    def replay(self) -> None:
        """Runs the function again on the same tensors."""


Capture = Callable[[Callable[[], Tensor]], tuple[Graph, Tensor]]
Forward = Callable[[Sequence[Tensor]], Tensor]


class CudaCapture:
    """Captures functions in CUDA graphs of one device, which share their memory.

    Args:
        device: the GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        with torch.cuda.device(device):
            # one stream for all captures, since cuBLAS allocates a workspace for each
            self._pool, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()

    def __call__(self, run: Callable[[], Tensor]) -> tuple[Graph, Tensor]:
        """Captures a function, which was run before, so that nothing is compiled, measured or loaded now.

        Args:
            run: the function.

        Returns:
            The graph, and the output tensor, which a replay writes and the next replay of another graph overwrites.
        """
        graph = torch.cuda.CUDAGraph()
        with (
            torch.cuda.device(self._device),
            # another thread may decode at the same time, and NCCL's own asks for the state of collectives
            torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"),
        ):
            output = run()
        return graph, output


@dataclass(frozen=True)
class _Captured:
    graph: Graph
    inputs: tuple[Tensor, ...]
    output: Tensor
    collectives: CapturedCollectives


class PassGraphs:
    """The graphs of a video: those of its stream, or of both its streams where it is guided.

    Args:
        capture: captures a function; a `CudaCapture`, or a stand-in in tests.
        device: where the stream computes.
        communicator: the ranks that share a pass, each of which calls `run` for the same passes; None for one rank.
    """

    def __init__(self, capture: Capture, device: torch.device, communicator: Communicator | None = None) -> None:
        self._capture, self._device, self._communicator = capture, device, communicator
        self._graphs: dict[Hashable, _Captured] = {}
        self._seen: dict[Hashable, int] = {}  # the chunk in which a kind was first seen
        self._failed = False
        self._refused: set[str] = set()
        self.replays = 0

    def run(
        self,
        kind: Hashable,
        chunk: int,
        inputs: Sequence[Tensor],
        forward: Forward,
        undo: Callable[[], None],
        obstacle: str | None = None,
    ) -> Tensor:
        """Runs a pass, by a graph if its kind was captured.

        Args:
            kind: what a graph depends on besides the numbers in `inputs`. It changes in the same pass on every rank.
            chunk: the number of the chunk that is denoised.
            inputs: the tensors that differ between passes of the kind.
            forward: computes the pass from such tensors.
            undo: restores what the pass overwrote, so that the pass may run again.
            obstacle: why this pass must run eagerly on this rank, or None.

        Returns:
            The output of the pass.
        """
        found = self._graphs.get(kind)
        if found is not None and obstacle is None:
            torch._foreach_copy_(_bytes_of(found.inputs), _bytes_of(inputs))  # in one call, whatever their dtypes
            with on(self._device):
                self._replay(found)
            self.replays += 1
            return found.output.clone()
        output = forward(inputs)
        later = chunk > self._seen.setdefault(kind, chunk)
        if found is None and later and len(self._graphs) < MOST_GRAPHS and not self._failed:
            self._try(kind, inputs, forward, undo, output, obstacle)
        return output

    def fork(self) -> PassGraphs:
        """Returns graphs for another stream: a graph has the addresses of one cache."""
        return PassGraphs(self._capture, self._device, self._communicator)

    def refuse(self, why: str) -> None:
        """Logs once why passes of some kind are never captured."""
        if why not in self._refused:
            self._refused.add(why)
            _log.info("passes run without CUDA graphs: %s", why)

    def _try(
        self,
        kind: Hashable,
        inputs: Sequence[Tensor],
        forward: Forward,
        undo: Callable[[], None],
        eager: Tensor,
        obstacle: str | None,
    ) -> None:
        """Captures a kind. A graph is kept only if on every rank its first replay gives what the eager pass gave."""
        undo()
        captured, why = (None, obstacle) if obstacle else self._captured(inputs, forward)
        why = self._first_refusal(why)
        if why is None and captured is not None:
            undo()
            captured.output.fill_(torch.nan)  # or a graph that holds nothing would leave what its capture computed
            with on(self._device):
                self._replay(captured)
            same = torch.allclose(captured.output, eager, rtol=1e-2, atol=1e-2 * float(eager.abs().max()))
            why = self._first_refusal(None if same else "its output differs from that of the eager pass")
        if why is None and captured is not None:
            self._graphs[kind] = captured
            return
        self._failed = True
        undo()
        forward(inputs)  # what the eager pass wrote
        if self._communicator is None or self._communicator.rank == 0:
            _log.warning("passes run without CUDA graphs: %s", why)

    def _captured(self, inputs: Sequence[Tensor], forward: Forward) -> tuple[_Captured | None, str | None]:
        """Captures a pass on inputs of its own; returns the graph, or the reason why there is none."""
        own = tuple(x.clone() for x in inputs)
        collecting: AbstractContextManager[CapturedCollectives] = nullcontext(CapturedCollectives())
        if self._communicator is not None:
            collecting = self._communicator.comm_stats.capturing()
        try:
            with collecting as collectives:
                graph, output = self._capture(lambda: forward(own))
        except RuntimeError as error:
            cause = error.__context__  # the end of a capture raises again
            return None, first_line(cause if isinstance(cause, RuntimeError) else error)
        return _Captured(graph, own, output, collectives), None

    def _replay(self, captured: _Captured) -> None:
        if self._communicator is not None:
            self._communicator.comm_stats.replay(captured.collectives, self._device)
        captured.graph.replay()

    def _first_refusal(self, why: str | None) -> str | None:
        """Returns on every rank the reason of the first rank that has one, or None if no rank has."""
        if self._communicator is None:
            return why
        by_rank = self._communicator.everyone({} if why is None else {"why": why})
        refusals = (f"{fields['why']} (on rank {rank})" for rank, fields in enumerate(by_rank) if fields)
        return next(refusals, None)


def stream_graphs(device: torch.device, communicator: Communicator | None = None) -> PassGraphs | None:
    """Returns the graphs of a video on a device; None where there are none, as on a CPU.

    Args:
        device: where the stream computes.
        communicator: the ranks that share a pass; None for one rank.
    """
    return PassGraphs(CudaCapture(device), device, communicator) if device.type == "cuda" else None


def _bytes_of(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [x.view(torch.uint8) for x in tensors]
