"""The gate before any timing: against float64, no operation's error is more than twice that of its torch reference."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from kernel_operations import Draw, Operation, Setting, operations
from torch import Tensor

from causalrope_sp.cache.window import SlidingWindow
from causalrope_sp.config import DiTConfig
from causalrope_sp.grid import LatentGrid, Shard


@dataclass(frozen=True)
class Verdict:
    """One output of an operation compared with float64. `error`, `reference` (the error of its torch reference) and
    `bound` are norms over all numbers; the `worst_` ones are those of the number with the largest error."""

    operation: str
    backend: str
    ranks: int
    dtype: str
    error: float
    reference: float
    bound: float
    worst_error: float
    worst_reference: float
    worst_bound: float
    passed: bool


def gate(device: torch.device) -> list[Verdict]:
    """Judges every operation at odd sizes: uneven shards that begin inside a row, time indices above 1024, and memory
    that is filled with NaN.

    On CUDA it runs with the head width and the dtype that are timed. Elsewhere it runs small sizes in Triton's
    interpreter, in the dtypes that the interpreter multiplies as a GPU does (that of Triton 3.9 does not for bfloat16).
    """
    small: Any = {"num_layers": 1, "text_dim": 16, "freq_dim": 32}
    if device.type == "cuda":
        config, grid, dtypes = DiTConfig(640, 896, 5, text_len=77, **small), LatentGrid(10, 13), [torch.bfloat16]
    else:
        config, grid = DiTConfig(100, 144, 5, text_len=7, **small), LatentGrid(5, 7)
        dtypes = [torch.float32, torch.float16]
    verdicts = list[Verdict]()
    for dtype, ranks in product(dtypes, (1, 3)):
        setting = Setting("", config, Shard(grid, ranks // 2, ranks), 3, SlidingWindow(7), 1031)
        for operation in operations(setting, dtype.itemsize):
            backends = ("triton", operation.backend) if device.type == "cuda" else ("triton",)
            for backend in dict.fromkeys(backends):
                verdicts += judge(operation, backend, ranks, device, dtype)
    return verdicts


def judge(
    operation: Operation, backend: str, ranks: int, device: torch.device, dtype: torch.dtype
) -> Iterator[Verdict]:
    """Compares the outputs of an operation with float64. The bounds are twice the reference's norm of errors, four
    times its largest error, and at least eight roundings of float32."""
    run = operation.judged or operation.run
    with _nan_in_empty():
        truth = run(operation.build(Draw.of(device, dtype, torch.float64)), "torch")
        rough = run(operation.build(Draw.of(device, dtype)), "torch")
        tested = run(operation.build(Draw.of(device, dtype)), backend)
    name = str(dtype).removeprefix("torch.")
    for output, other, exact in zip(*map(_outputs, (tested, rough, truth)), strict=True):
        numbers = exact[exact.isfinite()]
        sizes = numbers.norm().item(), numbers.abs().max().item()
        (error, worst), (allowed, allowed_worst) = _errors(output, exact), _errors(other, exact)
        roundings = [8 * torch.finfo(torch.float32).eps * size for size in sizes]
        bound, worst_bound = max(2 * allowed, roundings[0]), max(4 * allowed_worst, roundings[1])
        passed = error <= bound and worst <= worst_bound
        found = error, allowed, bound, worst, allowed_worst, worst_bound
        yield Verdict(operation.name, backend, ranks, name, *found, passed)


def _outputs(x: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (x,) if isinstance(x, Tensor) else x


def _errors(x: Tensor, truth: Tensor) -> tuple[float, float]:
    """Returns the norm of all errors and the largest one; infinite if a number was not written, or was written where
    none should be."""
    off = (x.double() - truth).abs()
    same = (x == truth) | (x.isnan() & truth.isnan())  # infinities, and numbers that must stay unwritten
    off = off.masked_fill(same, 0.0).nan_to_num(nan=math.inf)
    return off.norm().item(), off.max().item()


@contextmanager
def _nan_in_empty() -> Iterator[None]:
    """Makes allocated memory read as NaN until it is written."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(False)
