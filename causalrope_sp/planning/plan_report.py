"""The output of `causalrope-sp plan`: the costs of every strategy as a table, as JSON and as a plot."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

from causalrope_sp.distributed.mesh import possible_cfg_sizes
from causalrope_sp.heads.near_rows import pairs
from causalrope_sp.io.report_files import check_files, import_pyplot, save_plot
from causalrope_sp.planning.cost import Plan, plan
from causalrope_sp.planning.decode_cost import DecodePlan
from causalrope_sp.planning.machines import Machine
from causalrope_sp.planning.memory import NO_AUXILIARY, AuxiliaryMemory
from causalrope_sp.planning.workload import Workload

PLOTTED = (1, 2, 4, 8, 16, 32, 64)  # numbers of ranks


def decoding_fields(found: DecodePlan | None) -> dict[str, Any] | None:
    """Returns a plan of decoding in the form of JSON, None for None. `strategy` is that of the ranks that denoise."""
    if found is None:
        return None
    values = {name: getattr(found, name) for name in ("decode_ms", "rule", "decoders", "chunk_ms", "fps")}
    return {name: round(value, 4) for name, value in values.items()} | {"strategy": found.denoise.name}


def fields(cost: Plan) -> dict[str, Any]:
    """Returns a plan in the form of JSON; "auto" uses the plan that is `chosen`."""
    values = dataclasses.asdict(cost) | {"memory_bytes": cost.memory_bytes, "bytes_by_time": cost.bytes_by_time}
    return {name: round(v, 4) if isinstance(v, float) else v for name, v in values.items()}


def print_plan(work: Workload, costs: list[Plan], on: Machine) -> None:
    """Prints the costs of every strategy as a table.

    Args:
        work: the stream.
        costs: the plans, one of which is `chosen`.
        on: the machine.
    """
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
            _short(p.memory_bytes / 1e9) + ("!" if not p.fits else ""),
            f"{p.collectives_per_pass}",
            _short(p.bytes_per_pass / 1e6),
            *(_short(value) for value in (p.compute_ms, p.exposed_ms, p.chunk_ms, p.fps)),
            _short(p.first_frame_ms),
            f"{p.efficiency:.0%}",
        ]
        table.add_row(f"{p.name}{' ←' if p.chosen else ''}", *row, style="bold" if p.chosen else None)
    console = Console()
    console.print(table)
    console.print(_memory_in_words(next(p for p in costs if p.chosen)), highlight=False)
    console.print(
        "Predicted, not measured, for the rank with the most of each. GB: peak memory (! does not fit); calls, MB: "
        "collectives and data received in a pass; comp., exp., chunk: ms of a chunk for computing, for exposed "
        "communication and in all; first: ms to the first frames without loading and decoding; eff.: speedup per rank. "
        "← is the choice of auto"
        + ("; 2× is --guidance-parallel: half of the ranks for each branch." if work.guided else "."),
        highlight=False,
    )
    if work.reuse:
        console.print(_reuse_in_words(work, costs), highlight=False)
    if work.heads is not None:
        console.print(_heads_in_words(work, costs), highlight=False)
    uneven = [p for p in costs if p.imbalance > 1.02]
    for p in uneven:
        console.print(f"{p.name}: the busiest rank computes {p.imbalance - 1:.0%} more than the mean", highlight=False)


def print_decoding(found: DecodePlan, ranks: int) -> None:
    """Prints a plan of decoding on so many ranks in one sentence."""
    from rich.console import Console

    arrangement = f"{found.decoders} of {ranks} ranks decode alone" if found.decoders else "all ranks decode, in turn"
    if ranks == 1:
        arrangement = "one rank does both in turn"
    Console().print(
        f"Decoding takes {_short(found.decode_ms)} ms a chunk on one rank. A chunk with decoding takes "
        f"{_short(found.chunk_ms)} ms ({_short(found.fps)} fps) if {arrangement}, with {found.denoise.name} to denoise "
        f"(DeDiVAE's rule: {found.rule:.2f} decode ranks).",
        highlight=False,
    )


def _memory_in_words(cost: Plan) -> str:
    """The memory of the rank with the most of it: the bytes at each time, and their parts."""
    auxiliary, by_time = cost.auxiliary, cost.bytes_by_time
    parts = {
        "weights": cost.weights_bytes,
        "cache": cost.session.cache,
        "history": cost.session.history,
        "text": cost.session.text,
        "latents": cost.session.latents,
        "activations": cost.activation_bytes,
        "graphs": cost.session.graphs,
        "UMT5": auxiliary.text,
        "CLIP": auxiliary.image,
        "codec": auxiliary.codec,
        "codec state": cost.session.decoder,
        "codec activations": auxiliary.codec_activations,
        "workspace": auxiliary.workspace,
    }
    by_part = ", ".join(f"{name} {_short(size / 1e9)}" for name, size in parts.items() if size)
    times = ", ".join(f"{time} {_short(size / 1e9)}" for time, size in by_time.items())
    further = f"; each further session {_short(cost.session.bytes / 1e9)}"
    further += f" (GB above are for {cost.sessions} sessions, parts and times for one)" if cost.sessions > 1 else ""
    return f"GB on rank 0 with {cost.strategy}: {times}; parts: {by_part}{further}."


def _reuse_in_words(work: Workload, costs: list[Plan]) -> str:
    """The share of module outputs that passes reuse, by kind, and the bytes that this costs."""
    every = work.config.num_layers * (work.steps + work.guided)
    passes = [work.computed(step, branch) for branch, steps in enumerate(work.passes) for step in range(steps)]
    shares = {kind: 1 - sum(computed[kind] for computed in passes) / every for kind in work.computed(0)}
    most = _short(max(cost.stored_bytes for cost in costs) / 1e9)
    by_kind = ", ".join(f"{kind} {share:.0%}" for kind, share in shares.items())
    return f"Of a chunk's outputs are reused: {by_kind}. A rank stores at most {most} GB of outputs for it."


def _heads_in_words(work: Workload, costs: list[Plan]) -> str:
    """The shares of the keys that heads see and attend, and ρ of the strategies that share heads."""
    rings, c = work.head_rings(1), work.config
    every, tokens = c.num_layers * c.num_heads * work.window, (0, work.grid.tokens)
    shares = [pairs(work.grid, near, tokens, tokens) / work.grid.tokens**2 for near in rings.rows]
    seen, later = (rings.attended(0, work.window, chosen, shares) / every for chosen in (None, work.seen))
    attended = "" if later == seen else f", and attend {later:.0%} after a chunk's first pass"
    uneven = ", ".join(f"{p.name} {p.head_imbalance:.3f}" for p in costs if p.head_imbalance > 1)
    rho = f"; ρ, max/mean of the ranks: {uneven}" if uneven else ""
    return f"Heads see {seen:.0%} of the window's keys{attended}{rho}."


def _short(value: float) -> str:
    """A number of at least two digits that count, so that none but 0 itself is shown as 0."""
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 1 else f"{value:.2g}"


def plot_plan(work: Workload, on: Machine, path: Path, auxiliary: AuxiliaryMemory = NO_AUXILIARY) -> None:
    """Plots frames a second and memory of the best strategy of each kind over 1 to 64 ranks.

    Args:
        work: the stream.
        on: the machine.
        path: the .png, .svg or .pdf file to write.
        auxiliary: the memory of a rank in addition to the DiT and its cache.

    Raises:
        ConfigError: matplotlib is not installed.
        OutputError: the file has another suffix or cannot be written.
    """
    check_files(None, path)
    pyplot = import_pyplot()
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
    save_plot(figure, path)


def _kind(strategy: str) -> str:
    """The name of a strategy without its numbers of ranks."""
    return re.sub(r"ulysses\d+x(.*?)\d+", r"ulysses × \1", strategy)
