"""Measures which attention backend is the fastest for a shape, once per process, and logs the result.

A library attends plain rows only. Where keys are quantized or rotated on read, or heads or queries read different rows,
the Triton kernel is the only candidate and nothing is measured.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial

import torch
from torch import Tensor

from causalrope_kernels import reference
from causalrope_kernels.arguments import Keys
from causalrope_kernels.attention_libraries import LIBRARIES
from causalrope_kernels.backend import use_triton
from causalrope_kernels.launch import on
from causalrope_kernels.reference import Partial

RUNS = 5  # the median of so many is taken
BEHIND = 8  # rows, of at least one number of 2 bytes
CLOCK = 3e9  # cycles a second of the fastest GPU
LONGEST_SLEEP_S = 0.05  # one slow launch, such as one that compiles, must not let the device sleep for seconds
MOST_KEYS = 1 << 14  # more keys would not change the choice
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Shape:
    """The sizes that the choice depends on.

    Args:
        device: where the tensors live.
        dtype: of queries, keys and values.
        batch: B.
        queries: T.
        keys: L.
        heads: H.
        width: d.
    """

    device: torch.device
    dtype: torch.dtype
    batch: int
    queries: int
    keys: int
    heads: int
    width: int

    def rounded(self) -> Shape:
        """Returns the shape with the number of keys rounded up to a power of two, at most `MOST_KEYS`.

        A window fills from chunk to chunk; without rounding, every new length would be measured during the stream.
        """
        return replace(self, keys=min(MOST_KEYS, 1 << max(0, self.keys - 1).bit_length()))


@dataclass(frozen=True)
class Measured:
    """The result of a measurement.

    Args:
        chosen: the fastest backend.
        milliseconds: the time of every backend that ran and was right.
        refused: the reason for every backend that failed or was wrong.
    """

    chosen: str
    milliseconds: dict[str, float]
    refused: dict[str, str]


def choose(q_BTHD: Tensor, keys: Keys) -> str:
    """Chooses the backend for these queries, (B, T, H, d), and keys.

    Returns:
        "torch", "triton" or one of `LIBRARIES`.
    """
    if keys.k_scales is not None:
        return "triton" if use_triton("auto", q_BTHD) else "torch"
    triton = use_triton("auto", q_BTHD, keys.k, keys.v)
    if not triton or not q_BTHD.is_cuda or not keys.plain_rows or not q_BTHD.numel():
        return "triton" if triton else "torch"
    batch, queries, heads, width = q_BTHD.shape
    shape = Shape(q_BTHD.device, q_BTHD.dtype, batch, queries, keys.k.shape[1], heads, width).rounded()
    with on(q_BTHD.device):
        return measure(shape).chosen


@cache
def measure(shape: Shape) -> Measured:
    """Times every exact backend on random numbers of this shape and chooses the fastest that is right.

    A backend is right if its output differs from the reference by at most a few roundings to the dtype.
    """
    q, k, v = _random(shape)
    rows = min(shape.queries, 64)
    expected = _expected(q[:, :rows], k, v)
    candidates = {"triton": partial(by_triton, q, k, v)}
    for name, library in LIBRARIES.items():
        if library.exact and library.obstacle(q) is None:
            candidates[name] = partial(library.run, q, k, v)
    times: dict[str, float] = {}
    refused: dict[str, str] = {}
    for name, run in candidates.items():
        try:
            fault = _fault(run(), expected, rows)
            if fault is None:
                times[name] = median_milliseconds(run)
            else:
                refused[name] = fault
        except Exception as error:  # a library or a compiler may raise anything
            refused[name] = str(error).splitlines()[0] if str(error) else type(error).__name__
    chosen = min(times, key=times.__getitem__, default="triton")
    timings = ", ".join(f"{name} {ms:.3g} ms" for name, ms in sorted(times.items(), key=lambda item: item[1]))
    _log.info("attention of %d on %d tokens, %d heads of %d, %s, by %s: %s", shape.queries, shape.keys, shape.heads,
              shape.width, str(shape.dtype).removeprefix("torch."), chosen, timings)  # fmt: skip
    for name, why in refused.items():
        _log.info("attention: %s is left out: %s", name, why)
    return Measured(chosen, times, refused)


def by_triton(q: Tensor, k: Tensor, v: Tensor) -> Partial:
    from causalrope_kernels.attention_launch import attend
    from causalrope_kernels.merge_kernel import merge

    parts = attend(q, Keys(k, v))
    return parts[0] if len(parts) == 1 else merge(parts)


def _random(shape: Shape) -> tuple[Tensor, Tensor, Tensor]:
    """Random q, k and v; k and v are strided as a cache strides them. Memory may be short in the middle of a pass, so
    that both are views of one tensor, v as many rows behind k as keep its address a multiple of 16 bytes."""
    generator = torch.Generator(shape.device).manual_seed(0)

    def draw(rows: int) -> Tensor:
        sizes = shape.batch, rows, shape.heads, shape.width
        return torch.randn(sizes, generator=generator, device=shape.device, dtype=shape.dtype)

    q, keys = draw(shape.queries), draw(shape.keys + BEHIND)
    return q, keys[:, :-BEHIND], keys[:, BEHIND:]


def _expected(q: Tensor, k: Tensor, v: Tensor) -> Partial:
    """The reference's attention, head by head, since it copies keys and values to float32."""
    heads = [x.split(1, 2) for x in (q, k, v)]
    outputs, lses = zip(*map(reference.attention_lse, *heads), strict=True)
    return torch.cat(outputs, 2), torch.cat(lses, 2)


def _fault(result: Partial, expected: Partial, rows: int) -> str | None:
    """Why the first `rows` queries of a result are wrong, or None."""
    (output, lse), (right, right_lse) = result, expected
    if output.shape[1] < rows or output[:, :rows].shape != right.shape or lse[:, :rows].shape != right_lse.shape:
        return f"its output has shape {tuple(output.shape)}, its log-sum-exp {tuple(lse.shape)}"
    error = (output[:, :rows].double() - right.double()).abs().max().item()
    roundings = 4 if right.dtype.itemsize == 2 else 64  # in float32 the roundings of the sums count, too
    bound = roundings * torch.finfo(right.dtype).eps * right.double().abs().max().item()
    drift = (lse[:, :rows].double() - right_lse.double()).abs().max().item()
    if not error <= bound or not drift <= 1e-2:
        return f"its output is off by {error:.1e} (bound {bound:.1e}), its log-sum-exp by {drift:.1e}"
    return None


def median_milliseconds(run: Callable[[], object]) -> float:
    """The median time of `RUNS` runs on the current device alone: it sleeps until the host has launched them all. If it
    wakes up earlier, they are measured once more after a longer sleep."""
    run()
    torch.cuda.synchronize()
    began_launching = time.perf_counter()
    run()
    sleep_s = min(2 * RUNS * (time.perf_counter() - began_launching), LONGEST_SLEEP_S)
    slept, milliseconds = _launched_asleep(run, sleep_s)
    if not slept:
        slept, milliseconds = _launched_asleep(run, 4 * sleep_s)
    if not slept:
        _log.info("the host is slower than the device, so that measured times hold its launches")
    return sorted(milliseconds)[RUNS // 2]


def _launched_asleep(run: Callable[[], object], sleep_s: float) -> tuple[bool, list[float]]:
    """Times `RUNS` runs that are launched while the device sleeps; returns whether it still did after the last one."""
    torch.cuda._sleep(int(sleep_s * CLOCK))
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(RUNS)]
    for began, ended in pairs:
        began.record()
        run()
        ended.record()
    slept = not pairs[0][0].query()
    torch.cuda.synchronize()
    return slept, [began.elapsed_time(ended) for began, ended in pairs]
