"""What `causalrope-sp plan` says: the costs of every strategy as a table, as JSON and as a plot."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

from causalrope_sp.distributed.mesh import possible_cfg_sizes
from causalrope_sp.errors import ConfigError, OutputError
from causalrope_sp.planning.cost import Plan, plan
from causalrope_sp.planning.decode_cost import DecodePlan
from causalrope_sp.planning.machines import Machine
from causalrope_sp.planning.memory import NO_AUXILIARY, AuxiliaryMemory
from causalrope_sp.planning.workload import Workload

PLOTTED = (1, 2, 4, 8, 16, 32, 64)


def decoding_fields(found: DecodePlan | None) -> dict[str, Any] | None:
    """Decoding as JSON holds it; `strategy` is that of the ranks that denoise."""
    if found is None:
        return None
    values = {name: getattr(found, name) for name in ("decode_ms", "rule", "decoders", "chunk_ms", "fps")}
    return {name: round(value, 4) for name, value in values.items()} | {"strategy": found.denoise.name}


def fields(cost: Plan) -> dict[str, Any]:
    """A plan as JSON holds it; "auto" takes the one that is `chosen`."""
    values = dataclasses.asdict(cost) | {"memory_bytes": cost.memory_bytes, "bytes_by_time": cost.bytes_by_time}
    return {name: round(v, 4) if isinstance(v, float) else v for name, v in values.items()}


def print_plan(work: Workload, costs: list[Plan], on: Machine) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    c, tokens = work.config, work.grid.tokens
    title = (
        f"{c.num_layers} layers of {c.dim}, {c.num_heads} heads; {work.grid.rows}×{work.grid.columns} = {tokens} tokens"
        f" a frame; window {work.window}, chunk {work.chunk_frames} latent frames, {work.steps} steps"
        f"{f', {work.guided} of them guided' if work.guided else ''}; {on.name}"
    )
    table = Table(title=Text(title), title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for column in ("strategy", "GB", "calls", "MB", "comp.", "exp.", "chunk", "fps", "first", "eff."):
        table.add_column(column, justify="left" if column == "strategy" else "right", no_wrap=True)
    for p in costs:
        row = [
            f"{p.memory_bytes / 1e9:.1f}" + ("!" if not p.fits else ""),
            f"{p.collectives_per_pass}",
            f"{p.bytes_per_pass / 1e6:.0f}",
            *(_short(value) for value in (p.compute_ms, p.exposed_ms, p.chunk_ms, p.fps)),
            f"{p.first_frame_ms:.0f}",
            f"{p.efficiency:.0%}",
        ]
        table.add_row(f"{p.name}{' ←' if p.chosen else ''}", *row, style="bold" if p.chosen else None)
    console = Console()
    console.print(table)
    console.print(_memory_in_words(next(p for p in costs if p.chosen)), highlight=False)
    console.print(
        "Predicted, not measured. Of the rank that has most: GB of memory (! does not fit), calls and MB received in a "
        "pass. Milliseconds a chunk: computing, communication that nothing hides, all; and the first frames, without "
        "loading and decoding. eff.: one rank's time against all ranks' together. ← is what auto takes"
        + (", 2× with --guidance-parallel: a half of the ranks for each branch." if work.guided else "."),
        highlight=False,
    )
    if work.reuse:
        console.print(_what_is_reused(work, costs), highlight=False)
    uneven = [p for p in costs if p.imbalance > 1.02]
    for p in uneven:
        console.print(f"{p.name}: the busiest rank computes {p.imbalance - 1:.0%} more than the mean", highlight=False)


def print_decoding(found: DecodePlan, ranks: int) -> None:
    from rich.console import Console

    way = f"{found.decoders} of {ranks} ranks decode alone" if found.decoders else "all ranks decode together, in turn"
    if ranks == 1:
        way = "one rank does both in turn"
    Console().print(
        f"Decoding: {found.decode_ms:.0f} ms a chunk on one rank; with it {found.chunk_ms:.0f} ms, {_short(found.fps)} "
        f"fps if {way}, {found.denoise.name} for the others (DeDiVAE's rule: {found.rule:.2f} decode ranks).",
        highlight=False,
    )


def _memory_in_words(cost: Plan) -> str:
    auxiliary, by_time = cost.auxiliary, cost.bytes_by_time
    parts = {
        "weights": cost.weights_bytes,
        "cache": cost.cache_bytes,
        "activations": cost.activation_bytes,
        "UMT5": auxiliary.text,
        "codec": auxiliary.codec,
        "its state": auxiliary.codec_state,
        "its activations": auxiliary.codec_activations,
        "workspace": auxiliary.workspace,
    }
    said = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in parts.items() if size)
    times = ", ".join(f"{size / 1e9:.1f} to {time}" for time, size in by_time.items())
    return f"GB on rank 0 with {cost.strategy}: {times}; of {said}."


def _what_is_reused(work: Workload, costs: list[Plan]) -> str:
    every = work.config.num_layers * (work.steps + work.guided)
    passes = [work.computed(step, branch) for branch, steps in enumerate(work.passes) for step in range(steps)]
    shares = {kind: 1 - sum(computed[kind] for computed in passes) / every for kind in work.computed(0)}
    most = max(cost.stored_bytes for cost in costs)
    said = ", ".join(f"{kind} {share:.0%}" for kind, share in shares.items())
    return f"Of a chunk's outputs are reused: {said}; kept for it, at most {most / 1e9:.2f} GB a rank."


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def plot_plan(work: Workload, on: Machine, path: Path, auxiliary: AuxiliaryMemory = NO_AUXILIARY) -> None:
    """Frames a second and memory of the best strategy of each kind over 1 to 64 ranks.

    Raises:
        ConfigError: matplotlib is not installed.
        OutputError: no .png, .svg or .pdf file can be written there.
    """
    if path.suffix not in (".png", ".svg", ".pdf") or path.is_dir():
        raise OutputError(f"cannot draw {path}: it must be a .png, .svg or .pdf file")
    try:
        import matplotlib
    except ImportError:
        raise ConfigError("--plot needs matplotlib, which is not installed: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    kinds: dict[str, list[Plan]] = {}
    for ranks in (r for r in PLOTTED if r <= work.grid.tokens):
        best: dict[str, Plan] = {}
        sizes = possible_cfg_sizes(work.guided > 0, ranks)
        for cost in plan(work, ranks, on, cfg_sizes=sizes, auxiliary=auxiliary):
            kind = _kind(cost.name)
            if kind not in best or cost.chunk_ms < best[kind].chunk_ms:
                best[kind] = cost
        if ranks == 1:
            best = {kind: next(iter(best.values())) for kind in ("ulysses", "gather-kv", "shard-kv")}
        for kind, cost in best.items():
            kinds.setdefault(kind, []).append(cost)
    figure, (speed, memory) = pyplot.subplots(1, 2, figsize=(10, 3.6), constrained_layout=True)
    for kind, costs in kinds.items():
        ranks_of = [cost.ranks for cost in costs]
        speed.plot(ranks_of, [cost.fps for cost in costs], marker="o", markersize=3, label=kind)
        memory.plot(ranks_of, [cost.memory_bytes / 1e9 for cost in costs], marker="o", markersize=3, label=kind)
    for axis, label in ((speed, "frames a second (predicted)"), (memory, "GB a rank (predicted)")):
        axis.set(xlabel="ranks", ylabel=label, xscale="log", xticks=PLOTTED, xticklabels=PLOTTED)
        axis.grid(alpha=0.3)
    speed.set_yscale("log")
    speed.legend(fontsize=7)
    figure.suptitle(f"{work.config.num_layers} layers of {work.config.dim}, {on.name}", fontsize=9)
    try:
        figure.savefig(path, dpi=110)
    except OSError as error:
        raise OutputError(f"cannot draw {path}: {error.strerror or error}") from error


def _kind(strategy: str) -> str:
    return re.sub(r"ulysses\d+x(.*?)\d+", r"ulysses × \1", strategy)
