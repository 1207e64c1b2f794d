"""Loading takes as much memory of the host as the model itself, whatever kind of file it comes from."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import gguf
import pytest
import torch

from causalrope_sp.config import DiTConfig
from causalrope_sp.grid import LatentGrid
from causalrope_sp.models.causal_dit import CausalDiT
from causalrope_sp.planning.workload import Workload
from causalrope_sp.weights import save_model
from causalrope_sp.weights.key_layout import stored_tensors
from causalrope_sp.weights.wan_keys import WAN
from tests.support.stored_files import save_scaled_fp8, write_gguf

CONFIG = DiTConfig(dim=1024, ffn_dim=4096, num_heads=8, num_layers=8, text_dim=512)
SMALL = DiTConfig(dim=12, ffn_dim=8, num_heads=2, num_layers=1, text_dim=4, freq_dim=4, in_channels=2)
MEASURE = """
import json, sys, threading, time
from pathlib import Path
import torch
from causalrope_sp.weights import load_model

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:")) * 1024

def watch():
    while not done.is_set():
        peak.append(anonymous())
        time.sleep(0.001)

torch.set_num_threads(1)
load_model(sys.argv[3], weights=sys.argv[4])  # what is imported on the way is no part of it
before, peak, done = anonymous(), [0], threading.Event()
watcher = threading.Thread(target=watch)
watcher.start()
model = load_model(sys.argv[1], dtype=getattr(torch, sys.argv[2]), weights=sys.argv[4])
done.set()
watcher.join()
size = sum(p.numel() * p.element_size() for p in model.parameters())
print(json.dumps({"peak": max(*peak, anonymous()) - before, "model": size, "samples": len(peak)}))
"""


@pytest.fixture(scope="module")
def model() -> CausalDiT:
    with torch.device("meta"):
        model = CausalDiT(CONFIG)
    model.to(torch.bfloat16).to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.fill_(0.5)
    return model.requires_grad_(False)


def write(model: CausalDiT, folder: Path, kind: str) -> Path:
    file = folder / "w"
    if kind == "safetensors":
        save_model(model, file)
        return file
    state = stored_tensors(WAN, model.config, model.state_dict())
    if kind == "gguf":
        write_gguf(file, state, gguf.GGMLQuantizationType.Q8_0)
        return file
    if kind == "fp8":
        save_scaled_fp8(file, state, {"config": json.dumps(asdict(model.config))})
        return file
    torch.save(
        {"generator_ema": state, "critic": {"x": torch.zeros(10**6)}},
        file,
        _use_new_zipfile_serialization=kind != "legacy",
    )
    return file


def measure(file: Path, dtype: str, small: Path, weights: str = "full") -> dict[str, int]:
    command = [sys.executable, "-c", MEASURE, str(file), dtype, str(small), weights]
    # glibc would keep what was freed, and how much of it depends on the order of threads
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**20)}
    run = subprocess.run(command, capture_output=True, text=True, timeout=200, env=env)
    assert run.returncode == 0, run.stderr
    measured: dict[str, int] = json.loads(run.stdout.splitlines()[-1])
    return measured


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("safetensors", "bfloat16"),
        ("zipped", "bfloat16"),
        ("legacy", "bfloat16"),
        ("safetensors", "float32"),
        ("gguf", "bfloat16"),
        ("fp8", "bfloat16"),
    ],
)
def test_peak_memory_is_that_of_the_model(tmp_path: Path, model: CausalDiT, kind: str, dtype: str) -> None:
    """At most 1.2 times the model, beyond what the imports take, also if its file has 8 bits a number.

    What counts is RssAnon, the memory that only this process can free. The pages of a mapped file are in memory as well
    while they are copied, but they are the kernel's cache: clean, shared by all ranks that read the same file, and
    given up whenever somebody needs the room; counted with them, a process that reads a file in any way takes twice the
    file. The kernel keeps no peak of RssAnon, so a thread reads it every millisecond; what it could miss between two
    looks is one tensor. A legacy file of torch.save cannot be mapped: it is read whole, and let go tensor by tensor.
    """
    file = write(model, tmp_path, kind)
    save_model(CausalDiT(SMALL), tmp_path / "small")
    measured = measure(file, dtype, tmp_path / "small")
    numbers = sum(parameter.numel() for parameter in model.parameters())
    assert measured["model"] == numbers * getattr(torch, dtype).itemsize
    assert measured["model"] > 250e6
    assert measured["samples"] > 20
    allowed = 1.2 * measured["model"]
    assert measured["model"] * 0.95 < measured["peak"] < allowed, measured


def test_the_host_never_holds_what_is_folded_into_8_bits(tmp_path: Path, model: CausalDiT) -> None:
    """Beside the folded model there is one matrix, twice in float32: once as it is and once over its scales."""
    file = write(model, tmp_path, "safetensors")
    save_model(CausalDiT(SMALL), tmp_path / "small")
    measured = measure(file, "bfloat16", tmp_path / "small", "fp8")
    work = Workload(CONFIG, LatentGrid(1, 1), window=1, chunk_frames=1, steps=1, itemsize=2, fp8=True)
    assert measured["model"] == work.weights_bytes < 0.55 * file.stat().st_size
    matrix = CONFIG.dim * CONFIG.ffn_dim
    assert measured["model"] * 0.95 < measured["peak"] < measured["model"] + 2.5 * 4 * matrix, measured
