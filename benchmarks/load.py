"""Measures the processor time and the host memory that loading a checkpoint of the size of Wan 2.1 1.3B takes.

    OMP_NUM_THREADS=1 python benchmarks/load.py --folder /tmp

Writes a random bfloat16 file of 2.8 GB into a temporary folder there, and deletes it at the end. In turn, a process of
its own loads it, and another clones every mapped tensor of it, which is the floor: the same memory is read, allocated
and written. Gate: the weights must be those of the file. The last line is JSON.
"""

from __future__ import annotations

import gc
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import click
import torch
from large_model import large_model
from printed import finish, print_table
from safetensors import safe_open

from causalrope_sp.config import PRESETS
from causalrope_sp.models.causal_dit import CausalDiT
from causalrope_sp.weights import load_model, save_model


def write_random(file: Path, size: str) -> None:
    save_model(large_model(PRESETS[size]), file)


def status(field: str) -> int:
    """Returns a field of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def load(file: Path) -> CausalDiT:
    return load_model(file)


def clone(file: Path) -> list[torch.Tensor]:
    with safe_open(file, "pt") as stored:
        return [stored.get_tensor(name).clone() for name in stored.keys()]


def measure(work: Callable[[Path], CausalDiT | list[torch.Tensor]], file: Path) -> dict[str, float]:
    """Runs the work once, checks the gate and returns the measurements, in seconds and bytes."""
    gc.collect()  # what the imports left is no part of it
    before, spent, started = status("RssAnon"), time.process_time(), time.perf_counter()
    made = work(file)
    spent, seconds = time.process_time() - spent, time.perf_counter() - started
    anonymous, peak = status("RssAnon") - before, status("VmHWM")
    if isinstance(made, CausalDiT):
        with safe_open(file, "pt") as stored:
            for layer in (0, len(made.blocks) - 1):
                q = stored.get_tensor(f"blocks.{layer}.self_attn.q.weight")
                qkv = made.get_parameter(f"blocks.{layer}.self_attn.qkv.weight")
                assert torch.equal(qkv[: len(q)], q), "not the weights of the file"
    return {"processor": spent, "seconds": seconds, "anonymous": anonymous, "peak_with_mapped": peak}


WORK: dict[str, Callable[[Path], CausalDiT | list[torch.Tensor]]] = {"clone": clone, "load": load}


@click.command()
@click.option("--folder", type=click.Path(exists=True, file_okay=False), help="Folder of the file [default: temp].")
@click.option("--model", default="wan2.1-1.3b", show_default=True, type=click.Choice(list(PRESETS)))
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(min=1))
@click.option("--one", hidden=True, type=(click.Choice(list(WORK)), click.Path(path_type=Path)))
def main(folder: str | None, model: str, rounds: int, one: tuple[str, Path] | None) -> None:
    """Loads and clones a checkpoint in turn; prints medians and their ratio, and JSON in the last line."""
    if one is not None:
        print(json.dumps(measure(WORK[one[0]], one[1])))
        return
    found: dict[str, list[dict[str, float]]] = {name: [] for name in WORK}
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        file = Path(temporary) / "random.safetensors"
        write_random(file, model)
        size = file.stat().st_size
        for name in [*WORK] * rounds:
            command = [sys.executable, __file__, "--one", name, str(file)]
            run = subprocess.run(command, check=True, capture_output=True, text=True)
            found[name].append(json.loads(run.stdout.splitlines()[-1]))
    times = {name: [each["processor"] for each in several] for name, several in found.items()}
    rows = [(name, f"{median(several):.2f}", " ".join(f"{s:.2f}" for s in several)) for name, several in times.items()]
    print(f"a file of {size / 1e9:.2f} GB; processor time in seconds:")
    print_table(("work", "median", "each"), rows)
    ratio = median(times["load"]) / median(times["clone"])
    own, resident = (max(each[kind] for each in found["load"]) / size for kind in ("anonymous", "peak_with_mapped"))
    print(f"loading takes {ratio:.2f} of cloning (goal at most 1.15)")
    print(f"memory of its own {own:.3f} of the file (goal at most 1.2), with the file's own pages {resident:.3f}")
    finish(
        "load",
        file_gb=round(size / 1e9, 3),
        ratio=round(ratio, 3),
        measured=found,
        anonymous_of_file=round(own, 3),
        resident_with_mapped_of_file=round(resident, 3),
        threads=torch.get_num_threads(),
        processor=platform.processor() or platform.machine(),
    )


if __name__ == "__main__":
    main()
