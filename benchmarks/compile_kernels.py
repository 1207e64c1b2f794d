"""Compiles every Triton kernel as it is launched at the shapes of Wan 2.1, for GPUs that this machine need not have.

    python benchmarks/compile_kernels.py            # compares with benchmarks/compiled_kernels.md
    python benchmarks/compile_kernels.py --write    # writes it

The launchers run on meta tensors, and the kernels that they launch are compiled instead of run. Registers and spills
are read from the machine code, shared memory from the compiler.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest.mock import patch

import click
import torch
import triton
from absent_gpu import AbsentGPU
from torch import Tensor
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from causalrope_kernels import (
    Affine,
    Bands,
    Keys,
    Modulation,
    Pieces,
    Projection,
    QuantizedPieces,
    RotateOnRead,
    Rotation,
    Slots,
    attention_launch,
)
from causalrope_kernels.add_norm_kernel import add_norm
from causalrope_kernels.attention_launch import attend
from causalrope_kernels.merge_kernel import merge
from causalrope_kernels.norm_rope_store_launch import split_tokens, store_pieces, store_projection
from causalrope_kernels.quantize_kernel import quantize_rows
from causalrope_kernels.rms_norm_kernel import rms_norm
from causalrope_sp.config import PRESETS

TABLE = Path(__file__).with_name("compiled_kernels.md")
# the KiB of shared memory of a multiprocessor, of which a block gets 1 less
ARCHITECTURES = {80: 164, 90: 228, 100: 228, 120: 100}
E4M3 = 89  # the first architecture that converts to e4m3 numbers and multiplies them
ROWS, COLUMNS, FRAMES, WINDOW = 30, 52, 3, 21
TOKENS = ROWS * COLUMNS
QUANTIZED = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}


@dataclass(frozen=True)
class Row:
    """The resources of one kernel on one architecture: registers of a thread, bytes spilled, KiB of shared memory."""

    kernel: str
    case: str
    architecture: int
    warps: int
    registers: int
    spilled: int
    shared: float


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def launches() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yields a launch of every kernel, in every form of a stream of 1.3B or 14B at 480×832, and of other head
    widths."""
    for name, config in PRESETS.items():
        size = name.removeprefix("wan2.1-")
        yield from _norms(size, config.dim)
        for width in (config.dim, config.ffn_dim):
            x = empty(FRAMES * TOKENS, width)
            yield f"{size}, width {width}", partial(quantize_rows, x, torch.float8_e4m3fn, 448.0, 2.0**-100)
        yield from _placements(size, config.num_heads, config.head_dim)
    yield from _attentions()
    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
        for parts in (2, 8, 32):
            yield f"{name}, {parts} parts", partial(_merge, parts, dtype)


def _norms(size: str, dim: int) -> Iterator[tuple[str, Callable[[], Any]]]:
    x, vector = empty(1, FRAMES * TOKENS, dim), empty(dim)
    gate, shift, factor, *_ = empty(FRAMES, 6, dim, dtype=torch.float32).unbind(1)
    modulation = Modulation(shift, factor, 1e-6)
    yield f"{size}, modulate", partial(add_norm, x, None, None, modulation)
    yield f"{size}, gate, modulate", partial(add_norm, x, x, gate, modulation)
    few = empty(1, FRAMES * TOKENS // 8, dim)
    yield f"{size}, 8 ranks, gate, modulate", partial(add_norm, few, few, gate, modulation)
    yield f"{size}, add, modulate", partial(add_norm, x, x, None, modulation)
    yield f"{size}, gate, affine", partial(add_norm, x, x, gate, Affine(vector, vector, 1e-6))
    wide = empty(dim, dtype=torch.float32)  # as checkpoints have it that mix bfloat16 and float32
    yield f"{size}, gate, affine in float32", partial(add_norm, x, x, gate, Affine(wide, wide, 1e-6))
    yield size, partial(rms_norm, x, vector, 1e-6)


def _placements(size: str, heads: int, width: int) -> Iterator[tuple[str, Callable[[], Any]]]:
    times = torch.empty(FRAMES, dtype=torch.int64, device="meta")
    pairs = width // 6

    def table(positions: int, pairs: int) -> Tensor:
        return empty(positions, 2, pairs, dtype=torch.float32)

    for ranks in (1, 8):
        tokens = TOKENS // ranks
        rotation = Rotation(
            table(1024, width // 2 - 2 * pairs), table(ROWS, pairs), table(COLUMNS, pairs), times, times,
            start=0, tokens=tokens, columns=COLUMNS,
        )  # fmt: skip
        weight = empty(heads * width)
        projection = Projection(empty(1, FRAMES, tokens, 3 * heads * width), weight, weight, rotation, heads, 1e-6)
        q = [Slots(empty(1, FRAMES, tokens, heads, width))]
        ring = [Slots(empty(1, WINDOW, tokens, heads, width), times)]
        if ranks == 1:
            yield f"{size}, q and ring", partial(store_projection, projection, q, ring, ring)
            for name, dtype in QUANTIZED.items():
                k, v = (_quantized_ring(times, heads, width, dtype) for _ in range(2))
                offset = empty(1, heads, width, dtype=torch.float32)
                yield f"{size}, q and ring in {name}", partial(store_projection, projection, q, [k], [v], offset)
            rings = [Slots(part, row) for part, row in zip(ring[0].x.split(heads // 2, 3), torch.stack([times, times]))]
            yield f"{size}, q and two rings", partial(store_projection, projection, q, rings, rings)
            yield f"{size}, q", partial(store_projection, projection, q, (), ())
            yield f"{size}, ring", partial(store_projection, projection, (), ring, ring)
        else:
            yield f"{size}, {ranks} ranks, send buffer", partial(store_projection, projection, q, q, q)
    split = empty(2, 3, 1, FRAMES, TOKENS // 2, heads // 2, width)
    half = Pieces(list(split))
    output = empty(1, FRAMES, TOKENS, heads // 2, width)
    yield f"{size}, 2 ranks", partial(split_tokens, output, list(output.view(2, 1, FRAMES, -1, heads // 2, width)))
    q = [Slots(empty(1, FRAMES, TOKENS, heads // 2, width))]
    ring = [Slots(empty(1, WINDOW, TOKENS, heads // 2, width), times)]
    yield f"{size}, 2 ranks, q and ring", partial(store_pieces, half, q, ring, ring)
    for name, dtype in QUANTIZED.items():
        k, v = (_quantized_ring(times, heads // 2, width, dtype) for _ in range(2))
        numbers = empty(2, 2, 1, FRAMES, TOKENS // 2, heads // 2, width, dtype=dtype)
        scales = empty(*numbers.shape[:-1], dtype=torch.float16)
        sent = QuantizedPieces(list(split[:, 0]), list(numbers), list(scales))
        yield f"{size}, 2 ranks, q and ring in {name}", partial(store_pieces, sent, q, [k], [v])


def _quantized_ring(times: Tensor, heads: int, width: int, dtype: torch.dtype) -> Slots:
    ring = 1, WINDOW, TOKENS, heads
    return Slots(empty(*ring, width, dtype=dtype), times, scales=empty(*ring, dtype=torch.float16))


def _attentions() -> Iterator[tuple[str, Callable[[], Any]]]:
    for width in (64, 128):
        yield f"bf16, d {width}", partial(_attend, torch.bfloat16, width)
        yield f"bf16, d {width}, 2 ranges", partial(_attend, torch.bfloat16, width, ranges=2)
        yield f"bf16, d {width}, rotated on read", partial(_attend, torch.bfloat16, width, rotated=True)
        yield f"bf16, d {width}, 2 shares", partial(_attend, torch.bfloat16, width, shares=2)
        for name, dtype in QUANTIZED.items():
            yield f"bf16, d {width}, {name}", partial(_attend, torch.bfloat16, width, stored=dtype)
            rotated = partial(_attend, torch.bfloat16, width, stored=dtype, rotated=True)
            yield f"bf16, d {width}, {name}, rotated on read", rotated
        for name, stored in [("", None), *((f", {name}", dtype) for name, dtype in QUANTIZED.items())]:
            for rotates in (False, True):
                case = f"bf16, d {width}{name}, lists of heads{', rotated on read' * rotates}"
                yield case, partial(_attend, torch.bfloat16, width, stored=stored, rotated=rotates, lists=True)
            yield f"bf16, d {width}{name}, bands", partial(_attend, torch.bfloat16, width, stored=stored, bands=True)
        rotated = partial(_attend, torch.bfloat16, width, rotated=True, bands=True)
        yield f"bf16, d {width}, bands, rotated on read", rotated
    yield "bf16, d 256, fp8", partial(_attend, torch.bfloat16, 256, stored=torch.float8_e4m3fn)
    yield "bf16, d 128, fp8, 48 queries", partial(_attend, torch.bfloat16, 128, stored=torch.float8_e4m3fn, queries=48)
    yield "fp16, d 128, int8", partial(_attend, torch.float16, 128, stored=torch.int8)
    yield "fp32, d 128, fp8", partial(_attend, torch.float32, 128, stored=torch.float8_e4m3fn)
    yield "bf16, d 20", partial(_attend, torch.bfloat16, 20)
    yield "bf16, d 256", partial(_attend, torch.bfloat16, 256)
    yield "bf16, d 128, 48 queries", partial(_attend, torch.bfloat16, 128, queries=48)
    yield "bf16, d 128, rotated on read, 48 queries", partial(_attend, torch.bfloat16, 128, rotated=True, queries=48)
    yield "bf16, d 256, rotated on read", partial(_attend, torch.bfloat16, 256, rotated=True)
    yield "fp16, d 128", partial(_attend, torch.float16, 128)
    yield "fp32, d 128", partial(_attend, torch.float32, 128)
    yield "fp32, d 256", partial(_attend, torch.float32, 256)
    yield "fp32, d 128, lists of heads", partial(_attend, torch.float32, 128, lists=True)
    rotated = partial(_attend, torch.bfloat16, 128, stored=torch.int8, rotated=True, bands=True)
    yield "bf16, d 128, int8, bands, rotated on read", rotated
    yield "bf16, d 128, bands, lists of heads", partial(_attend, torch.bfloat16, 128, lists=True, bands=True)
    yield "fp32, d 128, bands", partial(_attend, torch.float32, 128, bands=True)
    yield "fp32, d 128, rotated on read", partial(_attend, torch.float32, 128, rotated=True)


def _attend(
    dtype: torch.dtype,
    width: int,
    *,
    ranges: int = 1,
    rotated: bool = False,
    shares: int = 1,
    queries: int = FRAMES * TOKENS,
    stored: torch.dtype | None = None,
    lists: bool = False,
    bands: bool = False,
) -> None:
    heads = 12
    ranges = (WINDOW + 1) // 2 if lists else ranges  # of frames that are chosen for each head, at most
    q = empty(1, queries, heads, width, dtype=dtype)
    k = empty(1, WINDOW * TOKENS, heads, width, dtype=stored or dtype)
    scales = None if stored is None else empty(1, WINDOW * TOKENS, heads, dtype=torch.float16)
    bounds = empty(*[heads] * lists, ranges, 2, dtype=torch.int32)
    rows = ((0, WINDOW * TOKENS),) * ranges
    height = 2 * COLUMNS
    queries_of = tuple((first, first + height) for first in range(0, TOKENS, height))
    keys_of = tuple((max(0, first - height), min(TOKENS, stop + height)) for first, stop in queries_of)
    rotate_on_read = (
        RotateOnRead(empty(WINDOW, 2, width // 2 - 2 * (width // 6), dtype=torch.float32), TOKENS) if rotated else None
    )
    with patch.object(attention_launch, "shares", lambda *shape: shares):
        whole, of_heads = (None, (rows,) * heads) if lists else (rows, None)
        of_bands = Bands(queries_of, keys_of, TOKENS) if bands else None
        attend(q, Keys(k, k, whole, bounds, rotate_on_read, scales, scales, of_heads, of_bands))


def _merge(parts: int, dtype: torch.dtype) -> None:
    heads, width = 12, 128
    shape = 1, FRAMES * TOKENS // 8, heads
    merge([(empty(*shape, width, dtype=dtype), empty(*shape, dtype=torch.float32)) for _ in range(parts)])


def compiled(architecture: int, number: int) -> list[Row]:
    """Compiles the kernels of one of the `launches`, by its number, for one architecture."""
    driver.set_active(AbsentGPU(architecture))
    case, launch = list(launches())[number]
    rows: list[Row] = []
    if architecture < E4M3 and isinstance(launch, partial) and launch.func is quantize_rows:
        return rows

    def compile_only(function: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        kernel = run(function, *args, grid=grid, warmup=True, **options)
        registers, spilled = _resources(kernel.asm["cubin"])
        name, metadata = function.fn.__name__.removesuffix("_kernel"), kernel.metadata
        rows.append(Row(name, case, architecture, metadata.num_warps, registers, spilled, metadata.shared / 1024))

    run = JITFunction.run
    with (
        patch.object(JITFunction, "run", compile_only),
        patch.object(attention_launch, "architecture", lambda device: architecture),
        patch.object(attention_launch, "PLANS", {}),  # they are made for the GPU of this process
    ):
        launch()
    return rows


def _resources(cubin: bytes) -> tuple[int, int]:
    """Returns the registers of a thread and its bytes of local memory, to which registers are spilled."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.findall(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    assert len(found) == 1, usage
    registers, stack, local = map(int, found[0])
    return registers, stack + local


def as_table(rows: list[Row]) -> str:
    lines = [
        "# Compiled kernels",
        "",
        "What every Triton kernel takes as it is launched for Wan 2.1 at 480×832: registers of a thread,",
        "bytes spilled, KiB of shared memory of a block. Compiled without a GPU by",
        f"`python benchmarks/compile_kernels.py --write`, Triton {triton.__version__}.",
        "",
        "| kernel | case | warps | " + " | ".join(f"sm_{a}" for a in ARCHITECTURES) + " |",
        "|---|---|---|" + "---|" * len(ARCHITECTURES),
    ]
    for row in (r for r in rows if r.architecture == max(ARCHITECTURES)):
        same = {r.architecture: r for r in rows if (r.kernel, r.case) == (row.kernel, row.case)}
        cells = (
            f"{r.registers} reg, {r.spilled} B, {r.shared:.1f} KiB" if r is not None else "–"
            for r in map(same.get, ARCHITECTURES)
        )
        lines.append(f"| {row.kernel} | {row.case} | {row.warps} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--write", is_flag=True, help=f"Writes {TABLE.name} instead of comparing with it.")
def main(write: bool) -> None:
    """Compiles every kernel and prints a table, then JSON. The status is 1 if a kernel spills, does not fit, or differs
    from the table."""
    tasks = list(product(ARCHITECTURES, range(len(list(launches())))))
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        rows = [row for found in pool.map(compiled, *zip(*tasks)) for row in found]
    table = as_table(rows)
    print(table)
    faults = [f"does not fit: {row}" for row in rows if row.spilled or row.shared > ARCHITECTURES[row.architecture] - 1]
    if write:
        TABLE.write_text(table)
    else:
        faults += differences(table.splitlines(), TABLE.read_text().splitlines())
    for fault in faults:
        print(fault)
    print(json.dumps({"rows": [asdict(row) for row in rows], "faults": faults, "triton": triton.__version__}))
    sys.exit(1 if faults else 0)


def differences(now: list[str], kept: list[str]) -> list[str]:
    """Returns the lines in which the tables differ; if another version of Triton made the kept one, only kernels and
    cases are compared."""
    if f"Triton {triton.__version__}." not in "\n".join(kept):
        now, kept = ([re.sub(r"\d+ reg, .*", "", line) for line in x if "reg," in line] for x in (now, kept))
    return [f"{TABLE.name} differs: {line}" for line in now if line not in kept] + [
        f"{TABLE.name} has, and nothing compiles to: {line}" for line in kept if line not in now
    ]


if __name__ == "__main__":
    main()
