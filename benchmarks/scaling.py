"""Compares real processes with the cost model: milliseconds a chunk, and how much of the communication is exposed.

    python benchmarks/scaling.py --ranks 1,2,4
    python benchmarks/scaling.py --ranks 1,2 --measured rates.json   # also writes the rates, for causalrope-sp plan

The model has random weights and a size that a few CPU cores can run. The rates of this machine (products, attention,
memory, link) are measured first, one rank on one core, so that the prediction does not rest on a data sheet. The cost
model does not know when more ranks than cores share the cores. Gate: the latents of every strategy differ from those of
one rank by at most 1e-5, relative.
"""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import torch
from rich import box
from rich.console import Console
from rich.table import Table

from causalrope_kernels import Keys, attention
from causalrope_sp import CausalDiT, DiTConfig, LatentGrid, SamplerConfig, SequenceParallel, StreamConfig, sample_chunks
from causalrope_sp.diffusion.noise import seeded_noise
from causalrope_sp.distributed import strategies
from causalrope_sp.distributed.launch import RankPool
from causalrope_sp.planning.cost import plan
from causalrope_sp.planning.machines import Machine
from causalrope_sp.planning.workload import Workload

if TYPE_CHECKING:
    import torch.distributed as dist

CONFIG = DiTConfig(dim=384, ffn_dim=1536, num_heads=6, num_layers=4, text_dim=64, text_len=16, freq_dim=64)
GRID = LatentGrid(12, 16)
STREAM = StreamConfig(window=12, chunk_frames=3)
SAMPLER = SamplerConfig((1000, 750, 500, 250))
CHUNKS, SKIPPED = 7, 4  # the window is full from the fifth chunk on


def run_stream(
    group: dist.ProcessGroup | None, device: str, strategy: str, overlap: bool, head_groups: int
) -> tuple[dict[str, float], torch.Tensor]:
    """Returns the milliseconds of a chunk with a full window, the part of them spent waiting for other ranks, and the
    latents of the last chunk."""
    torch.manual_seed(0)
    model = CausalDiT(CONFIG).eval().requires_grad_(False).to(device)
    parallel = SequenceParallel(group, strategy, device, overlap=overlap, head_groups=head_groups)
    frame = (CONFIG.in_channels, GRID.latent_height, GRID.latent_width)
    chunks = sample_chunks(
        model,
        torch.randn(1, CONFIG.text_len, CONFIG.text_dim),
        seeded_noise(0, (1, *frame)),
        GRID,
        CHUNKS * STREAM.chunk_frames,
        stream=STREAM,
        sampler=SAMPLER,
        parallel=parallel,
    )
    took, waited = [], []
    for _ in range(CHUNKS):
        started = time.perf_counter()
        latents = next(chunks).latents
        took.append(time.perf_counter() - started)
        waited.append(parallel.comm_stats.take().total().waited_s)
    middle = (CHUNKS - SKIPPED) // 2
    times = {"chunk_ms": 1e3 * sorted(took[SKIPPED:])[middle], "exposed_ms": 1e3 * sorted(waited[SKIPPED:])[middle]}
    return times, latents.clone()


def measure_link(group: dist.ProcessGroup, device: str) -> tuple[float, float]:
    """Returns the seconds before the first byte and the bytes a second that a rank receives in an all-to-all."""
    import torch.distributed as dist

    seconds = {}
    for size in (1 << 8, 1 << 22):
        sent, received = (torch.zeros(size, device=device) for _ in range(2))
        times = []
        for _ in range(9):
            dist.barrier()
            started = time.perf_counter()
            dist.all_to_all_single(received, sent, group=group)
            times.append(time.perf_counter() - started)
        seconds[size] = sorted(times)[len(times) // 2]
    small, large = seconds.values()
    share = (group.size() - 1) / group.size()
    return small, 4 * (1 << 22) * share / max(large - small, 1e-9)


def measure_machine(pool: RankPool) -> Machine:
    """Measures the rates of one rank on this machine, at the sizes of the benchmark's model."""
    tokens, keys = STREAM.chunk_frames * GRID.tokens, 12 * GRID.tokens
    x, w = torch.randn(tokens, CONFIG.dim), torch.randn(CONFIG.dim, CONFIG.ffn_dim)
    q = torch.randn(1, tokens, CONFIG.num_heads, CONFIG.head_dim)
    k = torch.randn(1, keys, CONFIG.num_heads, CONFIG.head_dim)
    large = torch.randn(1 << 25)
    latency, link = pool.run(measure_link, 2)
    return Machine(
        name="this machine, measured",
        matmul=2 * tokens * CONFIG.dim * CONFIG.ffn_dim / _seconds(lambda: x @ w),
        attention=4 * tokens * keys * CONFIG.dim / _seconds(lambda: attention(q, Keys(k, k))),
        bandwidth=2 * large.nbytes / _seconds(lambda: large * 2.0),
        memory=1e12,
        link=link,
        latency=latency,
    )


def _seconds(work: Any) -> float:
    times = []
    for _ in range(7):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return sorted(times)[3]


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--ranks", default="1,2,4", show_default=True)
@click.option("--measured", type=click.Path(path_type=Path), help="Write the measured rates into this file.")
def main(ranks: str, measured: Path | None) -> None:
    """Measures every strategy at every number of RANKS and compares with the cost model; the last line is JSON."""
    torch.set_num_threads(1)
    work = Workload.of(CONFIG, GRID, STREAM, SAMPLER, STREAM.window or 0, itemsize=4)
    rows: list[dict[str, Any]] = []
    with RankPool() as pool:
        machine = measure_machine(pool)
        if measured is not None:
            measured.write_text(json.dumps(dataclasses.asdict(machine), indent=1))
        _, alone = run_stream(None, "cpu", "ulysses", True, 1)
        for count in (int(word) for word in ranks.split(",")):
            predicted = {p.strategy: p for p in plan(work, count, machine)}
            names = strategies(count, CONFIG.num_heads)[: 1 if count == 1 else None]
            for name in names:
                variants = [(True, 1)] if count == 1 else [(True, 1), (False, 1)]
                if name == "ulysses":
                    variants = [(True, 1), (True, 2)] if 1 < count <= CONFIG.num_heads // 2 else [(True, 1)]
                for overlap, groups in variants:
                    found, latents = pool.run(run_stream, count, name, overlap, groups)
                    error = float((latents - alone).norm() / alone.norm())
                    assert error < 1e-5, f"{name} on {count} ranks is off by {error:.1e}"
                    p = predicted.get(name, next(iter(predicted.values())))
                    variant = "" if overlap and groups == 1 else ("head groups" if overlap else "no overlap")
                    rows.append(
                        {
                            "ranks": count,
                            "strategy": name if count > 1 else "single",
                            "variant": variant,
                            **{key: round(value, 2) for key, value in found.items()},
                            "predicted_ms": round(p.chunk_ms, 2),
                            "predicted_exposed_ms": round(p.exposed_ms, 2),
                            "predicted_communication_ms": round(p.communication_ms, 2),
                        }
                    )
    title = f"{GRID.tokens} tokens a frame, {CONFIG.num_layers} layers of {CONFIG.dim}, float32; milliseconds a chunk"
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for column in ("ranks", "strategy", "variant", "took", "exposed", "pred.", "exposed", "comm."):
        table.add_column(column, justify="left" if column in ("strategy", "variant") else "right", no_wrap=True)
    for row in rows:
        table.add_row(*map(str, row.values()))
    Console().print(table)
    click.echo(json.dumps({"benchmark": "scaling", "machine": dataclasses.asdict(machine), "rows": rows}))


if __name__ == "__main__":
    main()
