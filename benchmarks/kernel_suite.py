"""Measures every operation against its floor: the time that its bytes or its FLOP take at the rates that this GPU
reaches.

    python benchmarks/kernel_suite.py  # gate, floors, times, targets; on CUDA
    python benchmarks/kernel_suite.py --gate-only  # the gate alone; interpreted without CUDA
    python benchmarks/kernel_suite.py --floors --bandwidth 4.3e12 --matmul 790e12  # floors at given rates; no GPU
    needed

The shapes are those of one chunk of three frames of Wan 2.1 at 480×832, window 21, bfloat16, on the first of P ranks.
Gate: against float64, no operation's error is more than twice that of its torch reference in the same dtype; otherwise
nothing is timed and the status is 1. Times are those of the device alone: it sleeps until the host has launched a whole
round of calls, each on buffers of its own, so that no call finds its numbers in the cache. `eager` is the torch
reference, `compiled` the same through torch.compile.

Shapes: T tokens of the chunk on a rank, Q queries, L keys, H heads, h heads on a rank, d head width, D = H·d, P ranks,
N parts, M width of the feed-forward, e bytes of a number.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

import click
import torch
from kernel_gate import Verdict, gate
from kernel_operations import Setting, operations, settings
from kernel_times import TARGETS, Backends, Pass, Rates, Row, measure_rates, timed
from printed import finish, print_table, stop

from causalrope_sp.config import PRESETS


def print_gate(verdicts: Sequence[Verdict]) -> None:
    for v in verdicts:
        if not v.passed:
            norm, worst = f"{v.error:.1e} ({v.bound:.1e})", f"{v.worst_error:.1e} ({v.worst_bound:.1e})"
            case = f"{v.operation} by {v.backend}, P = {v.ranks}, {v.dtype}"
            print(f"gate: {case}: norm of errors (bound) {norm}, largest error (bound) {worst}")
    dtypes, passed = ", ".join(dict.fromkeys(v.dtype for v in verdicts)), sum(v.passed for v in verdicts)
    print(
        f"gate: the error of {passed} of {len(verdicts)} outputs in {dtypes} is at most twice that of their reference "
        "(four times for the largest error, or a few roundings to float32)\n"
    )


def print_floors(rates: Rates, shapes: Sequence[Setting]) -> None:
    """Prints the floor of every operation, in microseconds."""
    nothing = "" if rates.launch_us is None else f"; a kernel that moves nothing takes {rates.launch_us:.1f} µs"
    print(f"Floors at {rates.bandwidth / 1e12:.2f} TB/s and {rates.matmul / 1e12:.0f} TFLOP/s{nothing}; e = 2:\n")
    lines = []
    for s in shapes:
        for o in operations(s):
            amount = f"{o.amount / 1e9:.1f} GFLOP" if o.matrix else f"{o.amount / 1e6:.2f} MB"
            calls = o.per_pass if s.ranks == 1 else "-"
            what = s.model, s.ranks, _named(o.name, o.note), o.formula
            lines.append((*what, amount, f"{rates.floor_us(o):.2f}", calls))
    print_table(("model", "P", "operation", "bytes or FLOP", "", "floor µs", "calls a pass"), lines)


def print_rows(rows: Iterable[Row]) -> list[Row]:
    """Prints each row as soon as it is measured; returns all of them."""
    kept: list[Row] = []

    def lines() -> Iterator[tuple[object, ...]]:
        for row in rows:
            kept.append(row)
            yield _cells(row)

    columns = "model", "P", "operation", "floor µs", "eager", "compiled", "ours", "ours/floor", "eager/ours", "targets"
    print_table(columns, lines())
    for row in kept:
        if row.compile_failed:
            print(f"torch.compile failed: {row.model}, P = {row.ranks}, {row.operation}: {row.compile_failed}")
    return kept


def _cells(row: Row) -> tuple[object, ...]:
    compiled = "failed" if row.compile_failed else f"{row.compiled_us:.1f}" if row.compiled_us else "-"
    times = f"{row.floor_us:.1f}", f"{row.eager_us:.1f}", compiled, f"{row.ours_us:.1f}"
    ratios = f"{row.ours_us / row.floor_us:.2f}", f"{row.eager_us / row.ours_us:.1f}"
    missed = row.missed
    target = "-" if missed is None else f"missed: {', '.join(missed)}" if missed else "met"
    return row.model, row.ranks, _named(row.operation, row.note), *times, *ratios, target


def print_backends(rows: Sequence[Row]) -> None:
    """Prints the microseconds of attention by backend, and why a backend is left out."""
    found = [(row, row.backends) for row in rows if row.backends is not None]
    names = list(dict.fromkeys(name for _, backends in found for name in backends.us))
    lines = [
        (row.model, row.ranks, _named(row.operation, row.note), *(_us(b, name) for name in names), f"{b.of_best:.2f}")
        for row, b in found
    ]
    print_table(("model", "P", "attention", *names, "chosen's speed of the best"), lines)
    for line in dict.fromkeys(f"{name} {why}" for _, b in found for name, why in b.refused.items()):
        print(f"attention: left out: {line}")


def _us(backends: Backends, name: str) -> str:
    """Formats the microseconds of a backend, in bold if it is the chosen one."""
    mark = "**" if name == backends.chosen else ""
    return f"{mark}{backends.us[name]:.1f}{mark}" if name in backends.us else "-"


def _named(operation: str, note: str) -> str:
    return f"{operation} ({note})" if note else operation


def print_passes(passes: Sequence[Pass], *, measured: bool) -> None:
    for p in passes:
        target = ("met" if p.share <= TARGETS["share"] else "missed") if measured else "not measured"
        print(
            f"{p.model}, a pass at P = 1: memory-bound operations {p.memory_ms:.2f} ms, attention {p.attention_ms:.2f} "
            f"ms, products {p.products_ms:.2f} ms at the matrix rate; the first are {100 * p.share:.1f} % of the pass "
            f"(target: at most {100 * TARGETS['share']:.0f} %, {target})"
        )


def floors_alone(rates: Rates, shapes: Sequence[Setting]) -> None:
    """Prints the floors, and the JSON of them, without measuring anything."""
    print_floors(rates, shapes)
    passes = [Pass.of(s, rates, {o.name: rates.floor_us(o) for o in operations(s)}) for s in shapes if s.ranks == 1]
    print_passes(passes, measured=False)
    floors = [
        {
            "model": s.model,
            "ranks": s.ranks,
            "operation": o.name,
            "formula": o.formula,
            "amount": o.amount,
            "floor_us": rates.floor_us(o),
        }
        for s in shapes
        for o in operations(s)
    ]
    finish("kernels", rates=asdict(rates), floors=floors, passes=[asdict(p) | {"share": p.share} for p in passes])


def measured(device: torch.device, shapes: Sequence[Setting], compiles: bool) -> dict[str, Any]:
    """Measures and prints floors, then times; returns their fields of the JSON."""
    rates = measure_rates(device)
    print_floors(rates, shapes)
    rows = print_rows(timed(operation, s, rates, device, compiles) for s in shapes for operation in operations(s))
    print_backends(rows)
    passes = []
    for s in (s for s in shapes if s.ranks == 1):
        us = {row.operation: row.ours_us for row in rows if (row.model, row.ranks) == (s.model, 1)}
        passes.append(Pass.of(s, rates, us))
    print_passes(passes, measured=True)
    return {
        "device": torch.cuda.get_device_name(device),
        "rates": asdict(rates),
        "rows": [asdict(row) | {"missed": row.missed} for row in rows],
        "passes": [asdict(p) | {"share": p.share} for p in passes],
    }


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--gate-only", is_flag=True, help="Run the correctness gate alone; without CUDA in Triton's interpreter.")
@click.option("--floors", is_flag=True, help="Print the floors alone, at --bandwidth and --matmul; needs no GPU.")
@click.option("--bandwidth", type=float, help="Bytes a second, for --floors.")
@click.option("--matmul", type=float, help="FLOP a second, for --floors.")
@click.option("--model", "models", multiple=True, type=click.Choice(list(PRESETS)), default=list(PRESETS),
              help="A model to measure; the option may be repeated. Default: all.")  # fmt: skip
@click.option("--ranks", multiple=True, type=click.IntRange(1, 12), default=(1, 4, 8), show_default=True,
              help="P; the option may be repeated.")  # fmt: skip
@click.option("--no-compile", is_flag=True, help="Leave out torch.compile, which takes most of the time.")
def main(
    gate_only: bool,
    floors: bool,
    bandwidth: float | None,
    matmul: float | None,
    models: Sequence[str],
    ranks: Sequence[int],
    no_compile: bool,
) -> None:
    """Measures every operation against its floor; the last line is JSON."""
    cuda, shapes = torch.cuda.is_available(), settings(models, ranks)
    if floors:
        if not bandwidth or not matmul:
            stop("--floors needs the rates: --bandwidth in bytes a second, --matmul in FLOP a second")
        return floors_alone(Rates(bandwidth, matmul), shapes)
    if not cuda and not gate_only:
        stop("times need CUDA, and there is none here; without it there are --gate-only and --floors")
    os.environ["TRITON_INTERPRET"] = "0" if cuda else "1"  # before any kernel is defined
    device = torch.device("cuda" if cuda else "cpu")
    verdicts = gate(device)
    print_gate(verdicts)
    passed = all(verdict.passed for verdict in verdicts)
    found = measured(device, shapes, not no_compile) if passed and not gate_only else {}
    finish("kernels", passed=passed, gate=list(map(asdict, verdicts)), **found)
    sys.exit(0 if passed else 1)


if __name__ == "__main__":
    main()
