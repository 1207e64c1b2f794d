"""Sparse attention and small caches: what policies save, what they cost, and how far an oracle would go.

    python benchmarks/sparse.py | tee sparse.log      # docs/drawings/sparse_frontier.py draws the last line

- toybox: every policy, and their sums, against the same prompts and seeds without any. Windows of heads are of files
  that `causalrope-sp profile-heads` makes of two other prompts (`--windows`, RULE=VALUE).
- An oracle knows all scores: it keeps for each head of a pass the frames, or for each query the keys, that have most of
  the attention mass. It attends by torch under a mask, and saves nothing.
- Published widths with random weights and two layers: each policy against its emulation with masks.
- Published sizes by formula: shares of a dense bfloat16 stream. Those of toybox are by the same formulas, for bfloat16
  on 3 ranks.

Gates, or no more is reported: latents of random weights are those of masks to 1e-9 in float64; policies that leave
nothing out change no bit of toybox's frames; an oracle that keeps all keys, and a mask in place of a policy's windows,
give the same frames to 55 dB; the mean PSNR is at least 45 dB with the cache in int8 and 38 dB in fp8.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import click
import losses
import sparse_formulas as formulas
import torch
from click.testing import CliRunner
from masked_attention import attending, oracle_frames, oracle_tokens, windows
from printed import finish, print_table, stop
from sparse_exact import random_rows

from causalrope_sp import CausalVideoPipeline
from causalrope_sp.cli.main import cli
from causalrope_sp.heads import read_heads
from causalrope_sp.planning.workload import Workload

PROFILED = ("a red circle slides right", "a purple square pulses")  # not among those that are measured
LEAST_DB = {"cache=int8": 45.0, "cache=fp8": 38.0}
ALIKE_DB = 55.0  # frames of 8 bits that differ by rounding alone
RANKS = 3
ORACLES = {"oracle, tokens of a query": oracle_tokens, "oracle, frames of a head": oracle_frames}


def profiled(rules: list[str], folder: Path) -> dict[str, Path]:
    """Makes a policy file by each rule of profile-heads."""
    files = {}
    for rule in rules:
        kind, _, value = rule.partition("=")
        files[rule] = folder / f"{rule}.json"
        limit = {"mass": "--share", "search": "--budget"}[kind]
        made = CliRunner().invoke(
            cli, ["profile-heads", *PROFILED, "--rule", kind, limit, value, "--out", str(files[rule])]
        )
        if made.exit_code:
            stop(f"profile-heads by {rule} failed: {made.output}")
    return files


def policies(
    files: dict[str, Path], similar: list[str], summed: tuple[str, str]
) -> list[tuple[str, str, dict[str, Any]]]:
    """Series, name and options of loading of every policy; the sums have the windows and similar frames of `summed`."""
    windows = {f"windows, {rule}": {"heads": str(file)} for rule, file in files.items()}
    frames = {name: losses.options_of(name) for name in (f"similar_frames={number}" for number in similar)}
    found = [("8 bits", name, losses.options_of(name)) for name in (*LEAST_DB, "fp8-dynamic")]
    found += [(name.replace(", ", " by ").partition("=")[0], name, options) for name, options in windows.items()]
    found += [("similar frames", *each) for each in frames.items()]
    short, few = f"windows, {summed[0]}", f"similar_frames={summed[1]}"
    heads, chosen = windows[short], frames[few]
    found += [(f"similar frames and {short}", f"{short} + {name}", heads | options) for name, options in frames.items()]
    sums = {short: heads, few: chosen, f"{short} + {few}": heads | chosen}
    for more in ("cache=int8", "fp8-dynamic"):
        sums |= {f"{name} + {more}": options | losses.options_of(more) for name, options in sums.items()}
    return found + [("sums", name, options) for name, options in sums.items() if "cache" in options]


def work_of(pipe: CausalVideoPipeline) -> Workload:
    """The stream of a pipeline in bfloat16."""
    stream = pipe.config.stream
    return Workload.of(pipe.model.config, pipe.settings().grid, stream, pipe.config.sampler, stream.window or 0)


def gate(compared: losses.Comparison, file: Path) -> None:
    """Attention under masks gives what it stands for."""
    stream = compared.plain.config.stream
    rule = windows(read_heads(file, stream.chunk_frames, stream.sink), stream.window or 0, stream.sink)
    checks: list[tuple[str, AbstractContextManager[Any], CausalVideoPipeline]] = [
        *((f"{name}, of all", attending(oracle(1.0)), compared.plain) for name, oracle in ORACLES.items()),
        ("windows as masks", attending(rule), compared.pipe(heads=str(file))),
    ]
    for name, attention, pipe in checks:
        if (found := compared.alike_db(attention, pipe)) < ALIKE_DB:
            stop(f"{name}: expected the same frames, got {found:.1f} dB: nothing is reported")


def toybox(
    compared: losses.Comparison, rules: list[str], similar: list[str], summed: tuple[str, str], oracles: list[float]
) -> Iterator[dict[str, Any]]:
    """Rows of all policies and oracles, each as soon as it is measured."""
    dense = work_of(compared.plain)
    with tempfile.TemporaryDirectory() as folder:
        files = profiled(rules, Path(folder))
        gate(compared, files[summed[0]])
        yield compared.row("none", compared.plain) | formulas.shares(dense, dense, RANKS)
        for series, name, options in policies(files, similar, summed):
            pipe = compared.pipe(**options)
            row = compared.row(name, pipe) | formulas.shares(work_of(pipe), dense, RANKS)
            if row["psnr_db"] < LEAST_DB.get(name, 0.0):
                stop(f"{name}: expected {LEAST_DB[name]} dB, got {row['psnr_db']:.1f}: nothing more is reported")
            yield {"series": series, **row}
    for series, oracle in ORACLES.items():
        for share in oracles:
            row = compared.row(f"{series}, {share:.0%}", compared.plain, attending(oracle(share)))
            yield {"series": series, **row}


def show_exact(rows: list[dict[str, Any]]) -> None:
    """Prints the rows of random weights."""
    columns = ("random weights", "policy", "keys", "error against masks", "change of the latents")
    forms = {"keys": ".0%", "error": ".1e", "change": ".1e"}
    lines = ([row["model"], row["policy"], *(format(row[name], form) for name, form in forms.items())] for row in rows)
    print_table(columns, lines)


def show_full_size(rows: list[dict[str, Any]]) -> None:
    """Prints the rows of formulas, and which targets are met."""
    columns = (f"by formula, {formulas.RANKS} ranks", "size", "policy", *formulas.COLUMNS, "all FLOPs")
    lines = (
        [row["model"], f"{row['height']}×{row['width']}", row["policy"], *formulas.cells(row), f"{row['flops']:.2f}"]
        for row in rows
    )
    print_table(columns, lines)
    for found in formulas.targets(rows):
        words = (
            f"{name} {found[name]:.3f} ({'met' if found['met'][name] else 'missed'}: {most} at the most)"
            for name, most in formulas.TARGETS.items()
        )
        click.echo(f"1.3B, 480×832, {found['policy']}: {', '.join(words)}")
    click.echo()


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--prompts", default=8, show_default=True, type=click.IntRange(1))
@click.option("--frames", default=81, show_default=True, type=click.IntRange(1), help="Pixel frames of each video.")
@click.option(
    "--windows",
    "rules",
    default="mass=0.9,mass=0.8,mass=0.7,search=0.83,search=0.75,search=0.65,search=0.55",
    show_default=True,
    help="The rules that profile-heads makes windows by.",
)
@click.option("--similar", default="0,2,0.3,4,6", show_default=True, help="Values of similar_frames.")
@click.option(
    "--summed",
    default=("search=0.75", "4"),
    show_default=True,
    nargs=2,
    help="The one of --windows and the one of --similar that sums have.",
)
@click.option("--oracles", default="0.1,0.25,0.4,0.55,0.7,0.85", show_default=True, help="Shares that oracles keep.")
@click.option(
    "--random", default=",".join(formulas.MODELS), show_default=True, help="Widths to run with random weights."
)
def main(
    prompts: int, frames: int, rules: str, similar: str, summed: tuple[str, str], oracles: str, random: str
) -> None:
    """Measures policies of sparse attention; tables, each line once it is measured, then one line of JSON."""
    torch.set_num_threads(1)
    windows_of, chosen = rules.split(","), similar.split(",")
    if summed[0] not in windows_of or summed[1] not in chosen:
        raise click.UsageError(f"--summed: expected one of --windows and one of --similar, got {' '.join(summed)}")
    exact = [row for name in random.split(",") for row in random_rows(name)]
    sizes, rows = formulas.full_size(), list[dict[str, Any]]()
    show_exact(exact)
    show_full_size(sizes)
    compared = losses.Comparison("toybox", prompts, frames)
    measured = toybox(compared, windows_of, chosen, summed, [float(each) for each in oracles.split(",")])

    def line(row: dict[str, Any]) -> list[object]:
        rows.append(row)
        return [row["option"], *losses.cells(row), *formulas.cells(row)]

    columns = (f"toybox, formulas for {RANKS} ranks", *losses.COLUMNS, *formulas.COLUMNS)
    print_table(columns, map(line, measured))
    finish("sparse", prompts=prompts, frames=frames, rows=rows, exact=exact, full_size=sizes)


if __name__ == "__main__":
    main()
