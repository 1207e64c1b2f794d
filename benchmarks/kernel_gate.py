"""The gate before any time: against float64 no operation errs more than twice what its torch reference errs."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product

import torch
from kernel_operations import Draw, Operation, Setting, operations
from torch import Tensor

from causalrope_sp.cache.window import SlidingWindow
from causalrope_sp.config import DiTConfig
from causalrope_sp.grid import LatentGrid, Shard


@dataclass(frozen=True)
class Verdict:
    """One output of an operation against float64: its error, that of its torch reference and the bound, of all numbers
    together; and the same of the number that is furthest off."""

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
    """Every operation at odd sizes: uneven shards that begin inside a row, frames past 1024, memory full of NaN.

    On CUDA with the head width and the dtype that are timed, else small and interpreted, in the dtypes that Triton's
    interpreter multiplies as a GPU does (3.9's does not bfloat16).
    """
    small = {"num_layers": 1, "text_dim": 16, "freq_dim": 32}
    if device.type == "cuda":
        config, grid, dtypes = DiTConfig(640, 896, 5, text_len=77, **small), LatentGrid(10, 13), (torch.bfloat16,)
    else:
        config, grid = DiTConfig(100, 144, 5, text_len=7, **small), LatentGrid(5, 7)
        dtypes = (torch.float32, torch.float16)
    verdicts = []
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
    """Twice the reference's error is allowed for all numbers together, and four times its worst for any one; eight of
    float32's roundings where that is next to nothing."""
    run = operation.judged or operation.run
    with _nan_in_empty():
        truth = run(operation.build(Draw.of(device, dtype, torch.float64)), "torch")
        rough = run(operation.build(Draw.of(device, dtype)), "torch")
        ours = run(operation.build(Draw.of(device, dtype)), backend)
    name = str(dtype).removeprefix("torch.")
    for mine, other, exact in zip(*map(_outputs, (ours, rough, truth)), strict=True):
        numbers = exact[exact.isfinite()]
        sizes = numbers.norm().item(), numbers.abs().max().item()
        (error, worst), (allowed, allowed_worst) = _errors(mine, exact), _errors(other, exact)
        roundings = [8 * torch.finfo(torch.float32).eps * size for size in sizes]
        bound, worst_bound = max(2 * allowed, roundings[0]), max(4 * allowed_worst, roundings[1])
        passed = error <= bound and worst <= worst_bound
        found = error, allowed, bound, worst, allowed_worst, worst_bound
        yield Verdict(operation.name, backend, ranks, name, *found, passed)


def _outputs(x: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (x,) if isinstance(x, Tensor) else x


def _errors(x: Tensor, truth: Tensor) -> tuple[float, float]:
    """Of all numbers together, and the largest; infinite if one was not written, or written where none should be."""
    off = (x.double() - truth).abs()
    same = (x == truth) | (x.isnan() & truth.isnan())  # infinities, and what nobody should write
    off = off.masked_fill(same, 0.0).nan_to_num(nan=math.inf)
    return off.norm().item(), off.max().item()


@contextmanager
def _nan_in_empty() -> Iterator[None]:
    """Memory that is allocated reads as NaN until it is written."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(False)
