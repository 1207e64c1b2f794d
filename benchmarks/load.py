"""Measures the seconds and the host memory that loading a checkpoint of the size of Wan 2.1 1.3B takes.

    python benchmarks/load.py --folder /tmp

Writes a random bfloat16 file of 2.8 GB into a temporary folder there, loads it in a process of its own, and deletes it.
Gate: the weights must be those of the file. The floor is the time of one copy of so many bytes. The last line is JSON.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click
import torch
from safetensors import safe_open

from causalrope_sp.config import PRESETS
from causalrope_sp.models.causal_dit import CausalDiT
from causalrope_sp.weights import load_model, save_model


def write_random(file: Path, size: str) -> None:
    with torch.device("meta"):
        model = CausalDiT(PRESETS[size]).to(torch.bfloat16)
    model.to_empty(device="cpu")
    pattern = torch.randn(1 << 20).to(torch.bfloat16)
    for parameter in model.parameters():
        flat = parameter.data.view(-1)
        for start in range(0, len(flat), len(pattern)):
            flat[start : start + len(pattern)] = pattern[: len(flat) - start]
    save_model(model.requires_grad_(False), file)


def status(field: str) -> int:
    """Returns a field of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def load(file: Path) -> dict[str, float]:
    """Loads the file once, checks the gate and returns the measurements, in seconds and bytes."""
    before, started = status("RssAnon"), time.perf_counter()
    model = load_model(file)
    seconds = time.perf_counter() - started
    anonymous, peak = status("RssAnon") - before, status("VmHWM")
    with safe_open(file, "pt") as stored:
        for layer in (0, len(model.blocks) - 1):
            q = stored.get_tensor(f"blocks.{layer}.self_attn.q.weight")
            assert torch.equal(model.blocks[layer].self_attn.qkv.weight[: len(q)], q), "not the weights of the file"
    source = torch.empty(1 << 28, dtype=torch.uint8).fill_(1)
    target = torch.empty_like(source).fill_(0)
    started = time.perf_counter()
    target.copy_(source)
    floor = file.stat().st_size / len(source) * (time.perf_counter() - started)
    return {"seconds": seconds, "floor_s": floor, "anonymous": anonymous, "peak_with_mapped": peak}


@click.command()
@click.option("--folder", type=click.Path(exists=True, file_okay=False), help="Folder of the file [default: temp].")
@click.option("--model", default="wan2.1-1.3b", show_default=True, type=click.Choice(list(PRESETS)))
@click.option("--runs", default=3, show_default=True)
@click.option("--one", hidden=True, type=click.Path(path_type=Path), help="Load this file and print its figures.")
def main(folder: str | None, model: str, runs: int, one: Path | None) -> None:
    if one is not None:
        print(json.dumps(load(one)))
        return
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        file = Path(temporary) / "random.safetensors"
        write_random(file, model)
        size = file.stat().st_size
        loads = []
        for _ in range(runs):
            command = [sys.executable, __file__, "--one", str(file)]
            run = subprocess.run(command, check=True, capture_output=True, text=True)
            loads.append(json.loads(run.stdout.splitlines()[-1]))
    best = min(loads, key=lambda figures: figures["seconds"])
    result = {
        "file_gb": round(size / 1e9, 3),
        "floor_s": round(best["floor_s"], 2),
        "seconds": round(best["seconds"], 2),
        "all_seconds": [round(figures["seconds"], 2) for figures in loads],
        "anonymous_of_file": round(max(figures["anonymous"] for figures in loads) / size, 3),
        "resident_with_mapped_of_file": round(max(figures["peak_with_mapped"] for figures in loads) / size, 3),
        "threads": torch.get_num_threads(),
        "processor": platform.processor() or platform.machine(),
    }
    print(f"floor, one copy in memory  {result['floor_s']:>7} s")
    print(f"load, best of {runs}            {result['seconds']:>7} s")
    print(f"memory of its own          {result['anonymous_of_file']:>7} of the file (goal at most 1.2)")
    print(f"with the file's own pages  {result['resident_with_mapped_of_file']:>7} of the file")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
