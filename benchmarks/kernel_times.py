"""Measures the device's time for an operation, with its floor and the times of other implementations.

Times are those of the device alone: it sleeps until the host has launched a whole round of calls, each on buffers of
its own, so that no call finds its numbers in the cache.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from kernel_operations import Attention, Draw, Operation, Setting, operations
from torch import Tensor

from causalrope_kernels.attention_choice import CLOCK, Shape, choose, measure
from causalrope_kernels.attention_libraries import LIBRARIES
from causalrope_sp.planning.workload import Workload

TARGETS = {"of_floor": 1.25, "of_eager": 4.0, "of_best": 0.95, "share": 0.06}
ROUNDS, L2 = 5, 60e6  # timed rounds, bytes of the cache
SIDE = 8192  # of the matrices that the matrix rate is measured with


@dataclass(frozen=True)
class Rates:
    """The rates of a device: bytes a second of a copy, FLOP a second of a large bf16 product, and microseconds of a
    kernel that moves nothing."""

    bandwidth: float
    matmul: float
    launch_us: float | None = None

    def floor_us(self, operation: Operation) -> float:
        return 1e6 * operation.amount / (self.matmul if operation.matrix else self.bandwidth)


def microseconds(run: Callable[[Any], Any], copies: Sequence[Any]) -> float:
    """Measures the device's microseconds for one call, as the median of a few rounds of one call on each of the copies.

    The outputs of a round are kept until it ends, so that no call reuses memory that another left in the cache.
    """

    def once() -> list[Any]:
        return [run(inputs) for inputs in copies]

    once()  # compiles, and copies to the device what is copied once
    torch.cuda.synchronize()
    started = time.perf_counter()
    once()
    launching = time.perf_counter() - started
    times = []
    for _ in range(ROUNDS):
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        torch.cuda._sleep(int(2 * launching * CLOCK))
        began.record()
        kept = once()
        ended.record()
        torch.cuda.synchronize()
        del kept
        times.append(began.elapsed_time(ended))
    return 1e3 * median(times) / len(copies)


def measure_rates(device: torch.device) -> Rates:
    draw = Draw.of(device, torch.bfloat16)
    large = torch.empty(2, 1 << 29, dtype=torch.bfloat16, device=device)  # 1 GiB each
    matrices = draw(2, SIDE, SIDE)
    copied = microseconds(lambda pair: pair[1].copy_(pair[0]), [large])
    multiplied = microseconds(lambda pair: pair[0] @ pair[1], 4 * [matrices])
    nothing = microseconds(Tensor.zero_, [large[0, :1]] * 64)
    return Rates(1e6 * large.nbytes / copied, 1e6 * 2 * SIDE**3 / multiplied, nothing)


@dataclass(frozen=True)
class Backends:
    """Microseconds of attention by every backend that ran, why the others did not, and the one that "auto" chose."""

    chosen: str
    us: dict[str, float]
    refused: dict[str, str]

    @property
    def of_best(self) -> float:
        """The time of the fastest exact backend divided by that of the chosen one."""
        exact = [us for name, us in self.us.items() if name not in LIBRARIES or LIBRARIES[name].exact]
        return min(exact) / self.us[self.chosen] if self.chosen in self.us else 0.0


@dataclass(frozen=True)
class Row:
    """The measurements of one operation at one shape. `compiled_us` is None if torch.compile failed or was left out."""

    model: str
    ranks: int
    operation: str
    note: str
    formula: str
    floor_us: float
    eager_us: float
    compiled_us: float | None
    compile_failed: str | None
    ours_us: float
    matrix: bool
    per_pass: int
    backends: Backends | None = None

    @property
    def missed(self) -> list[str] | None:
        """The targets that were missed; None if the operation has no target."""
        if self.backends is not None:
            return ["best"] if self.backends.of_best < TARGETS["of_best"] else []
        if self.matrix:
            return None
        slow = {
            "floor": self.ours_us > TARGETS["of_floor"] * self.floor_us,
            "eager": self.eager_us < TARGETS["of_eager"] * self.ours_us,
        }
        return [name for name, is_missed in slow.items() if is_missed]


def timed(operation: Operation, s: Setting, rates: Rates, device: torch.device, compiles: bool) -> Row:
    inputs = [operation.build(Draw.of(device, torch.bfloat16)) for _ in range(_copies(operation))]
    ours = microseconds(lambda x: operation.run(x, operation.backend), inputs)
    eager = microseconds(lambda x: operation.run(x, "torch"), inputs)
    compiled, failed = _compiled(operation, inputs) if compiles else (None, None)
    return Row(
        model=s.model,
        ranks=s.ranks,
        operation=operation.name,
        note=operation.note,
        formula=operation.formula,
        floor_us=rates.floor_us(operation),
        eager_us=eager,
        compiled_us=compiled,
        compile_failed=failed,
        ours_us=ours,
        matrix=operation.matrix,
        per_pass=operation.per_pass,
        backends=_backends(operation, inputs) if operation.attends else None,
    )


def _copies(operation: Operation) -> int:
    """Returns how many copies are needed so that twice the cache's bytes lie between two calls on the same one."""
    return 4 if operation.matrix else max(2, min(64, math.ceil(2 * L2 / operation.amount)))


def _compiled(operation: Operation, inputs: Sequence[Any]) -> tuple[float | None, str | None]:
    """Measures the reference through torch.compile for this one shape: returns its microseconds, or why it failed.

    The angles of a rotation are looked up before the timing, in its favour and in that of eager.
    """
    torch.compiler.reset()
    run = torch.compile(lambda x: operation.run(x, "torch"), dynamic=False)
    try:
        return microseconds(run, inputs), None
    except Exception as error:
        return None, _in_a_line(error)


def _backends(operation: Operation, inputs: Sequence[Attention]) -> Backends:
    q, keys = inputs[0]
    batch, queries, heads, width = q.shape
    measured = measure(Shape(q.device, q.dtype, batch, queries, keys.k.shape[1], heads, width))
    refused, us = dict(measured.refused), {}
    for name in ("triton", *LIBRARIES):
        obstacle = LIBRARIES[name].obstacle(q) if name in LIBRARIES else None
        if obstacle is not None:
            refused[name] = obstacle
        elif name not in refused:
            try:
                us[name] = _by_backend(operation, name, inputs)
            except (RuntimeError, ImportError, TypeError, ValueError) as error:
                refused[name] = _in_a_line(error)
    return Backends(choose(q, keys), us, refused)


def _by_backend(operation: Operation, backend: str, inputs: Sequence[Attention]) -> float:
    return microseconds(lambda x: operation.run(x, backend), inputs)


def _in_a_line(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"


@dataclass(frozen=True)
class Pass:
    """Milliseconds of one pass on one rank: memory-bound operations, attention, matrix products."""

    model: str
    memory_ms: float
    attention_ms: float
    products_ms: float

    @property
    def share(self) -> float:
        return self.memory_ms / (self.memory_ms + self.attention_ms + self.products_ms)

    @classmethod
    def of(cls, s: Setting, rates: Rates, us: dict[str, float]) -> Pass:
        """Sums the microseconds of every operation, by name; the products are taken at the matrix rate."""
        work = Workload(s.config, s.shard.grid, s.window.frames, s.frames, steps=1)
        sums = {"memory": 0.0, "attention": 0.0}
        for operation in operations(s):
            if operation.attends or not operation.matrix:
                sums["attention" if operation.attends else "memory"] += operation.per_pass * us[operation.name] / 1e3
        return cls(s.model, sums["memory"], sums["attention"], 1e3 * work.linear_flops * s.tokens / rates.matmul)
