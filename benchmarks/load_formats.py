"""Measures what loading takes from files of each format, against safetensors' own reading of the same bytes.

    OMP_NUM_THREADS=1 python benchmarks/load_formats.py --folder /tmp

Writes one random model in each format into a temporary folder there. For each a process of its own loads it, after
`safetensors.torch.load_file` has read and copied a file of as many bytes, those of the adapter included, which is the
floor. Seconds are those of the processor, and all files are in the page cache. Gate: the weights must be those that the
format's own arithmetic gives. The last line is JSON.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click
import gguf
import torch
from large_model import large_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from causalrope_sp.config import PRESETS, DiTConfig
from causalrope_sp.weights import load_model
from causalrope_sp.weights.diffusers_keys import DIFFUSERS
from causalrope_sp.weights.key_layout import stored_tensors
from causalrope_sp.weights.wan_keys import WAN

GGUF = {"GGUF Q8_0": gguf.GGMLQuantizationType.Q8_0, "GGUF Q4_0": gguf.GGMLQuantizationType.Q4_0}
LAYOUTS = ("bfloat16", "diffusers' names", "torch file", "all-in-one", "Wan 2.2 5B")
ADAPTERS = ("LoRA", "DoRA", "LoHa", "LoKr")
FORMATS = (*LAYOUTS, "scaled fp8", "scaled fp8, kept", *GGUF, *ADAPTERS)
GATED, RANK, ADAPTER = "blocks.0.ffn.0.weight", 32, "adapter.safetensors"


def random_state(name: str, config: DiTConfig) -> dict[str, Tensor]:
    layout = DIFFUSERS if name in ("diffusers' names", "Wan 2.2 5B") else WAN
    return stored_tensors(layout, config, large_model(config).state_dict())


def write(name: str, file: Path, state: dict[str, Tensor], config: DiTConfig) -> Tensor:
    """Writes a model in a format; returns the gated matrix as the format's own arithmetic gives it."""
    declared = {"config": json.dumps(asdict(config))}
    matrices = [key for key, tensor in state.items() if key.startswith("blocks") and tensor.ndim == 2]
    if name in GGUF:
        writer, kind, exact = gguf.GGUFWriter(file, "wan"), GGUF[name], Tensor()
        for key, tensor in state.items():
            if key not in matrices:
                writer.add_tensor(key, tensor.float().numpy())
                continue
            data = gguf.quants.quantize(tensor.float().numpy(), kind)
            writer.add_tensor(key, data, raw_dtype=kind)
            if key == GATED:
                exact = torch.from_numpy(gguf.quants.dequantize(data, kind))
        for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
            step()
        writer.close()
        return exact
    if name in LAYOUTS or name in ADAPTERS:
        gated = state.get(GATED, state.get("blocks.0.ffn.net.0.proj.weight"))
        assert gated is not None, "each layout has the matrix"
        if name == "torch file":
            torch.save({"generator_ema": state, "config": {"num_heads": config.num_heads}}, file)
        elif name == "all-in-one":
            others = {"vae.decoder.conv1.weight": torch.zeros(8), "text_encoders.t5.shared.weight": torch.zeros(8)}
            save_file({f"model.diffusion_model.{key}": x for key, x in state.items()} | others, file, declared)
        else:
            save_file(state, file, declared)
        return adapted(name, file, gated, matrices, state) if name in ADAPTERS else gated
    scale = torch.tensor(0.01)
    numbers = {key: (state[key].float() / scale).to(torch.float8_e4m3fn) for key in matrices}
    scales = {f"{key.removesuffix('weight')}scale_weight": scale.clone() for key in matrices}
    save_file(state | numbers | scales, file, declared)
    return numbers[GATED].float() * scale


def adapted(name: str, file: Path, gated: Tensor, matrices: list[str], state: dict[str, Tensor]) -> Tensor:
    """Writes an adapter of every matrix of the blocks beside the file; returns the gated matrix merged with it."""
    changes, exact = dict[str, Tensor](), gated.float()
    for key in matrices:
        module, (rows, columns) = key.removesuffix(".weight"), state[key].shape
        down, up = torch.randn(RANK, columns) / columns**0.5, torch.randn(rows, RANK) / 100
        delta = up @ down if key == GATED else None
        if name in ("LoRA", "DoRA"):
            parts = {"lora_A.weight": down, "lora_B.weight": up}
        elif name == "LoHa":
            parts = {"hada_w1_a": up, "hada_w1_b": down, "hada_w2_a": 2 * up, "hada_w2_b": down.clone()}
            delta = None if delta is None else 2 * delta * delta
        else:
            small, large = torch.randn(8, 8) / 100, torch.randn(rows // 8, columns // 8)
            parts = {"lokr_w1": small, "lokr_w2": large}
            delta = None if delta is None else torch.kron(small, large)
        if delta is not None:
            exact = exact + delta
        if name == "DoRA":
            parts["lora_magnitude_vector"] = state[key].float().norm(dim=1)
            if key == GATED:
                exact = exact * (parts["lora_magnitude_vector"] / exact.norm(dim=1)).unsqueeze(1)
        changes |= {f"{module}.{part}": tensor for part, tensor in parts.items()}
    save_file(changes, file.with_name(ADAPTER))
    return exact


def own_memory() -> int:
    """The bytes that only this process can free."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))


def measure(name: str, file: Path, exact: Path, as_bytes: Path) -> dict[str, float]:
    """Loads a file once, after its floor, and checks the gate; seconds, and bytes of the model and of the memory."""
    started = time.process_time()
    copied = {key: tensor.clone() for key, tensor in load_file(as_bytes).items()}
    floor = time.process_time() - started
    del copied
    before, started = own_memory(), time.process_time()
    loras = [file.with_name(ADAPTER)] if name in ADAPTERS else []
    model = load_model(file, dtype=torch.bfloat16, weights="fp8" if name.endswith("kept") else "full", loras=loras)
    seconds, memory = time.process_time() - started, own_memory() - before
    found, wanted = model.get_submodule("blocks.0.ffn.up").weight, load_file(exact)["exact"]
    assert isinstance(found, Tensor), "a linear layer has a weight"
    if name in ADAPTERS:  # a product is rounded once, in whatever order it is summed
        assert (found.float() - wanted).abs().max() <= 2**-8 * wanted.abs().max(), "other weights"
    else:
        assert name.endswith("kept") or torch.equal(found, wanted.to(torch.bfloat16)), "other weights"
    size = sum(parameter.nbytes for parameter in model.parameters())
    return {"floor_s": floor, "seconds": seconds, "memory": memory, "model": size, "file": bytes_of(file)}


def bytes_of(file: Path) -> int:
    """The bytes of a file and of the adapter beside it."""
    adapter = file.with_name(ADAPTER)
    return file.stat().st_size + (adapter.stat().st_size if adapter.exists() else 0)


@click.command()
@click.option("--folder", type=click.Path(exists=True, file_okay=False), help="Folder of the files [default: temp].")
@click.option("--layers", default=6, show_default=True, help="Blocks of Wan 2.1 1.3B; a third of Wan 2.2 5B.")
@click.option("--runs", default=3, show_default=True)
@click.option("--format", "names", multiple=True, default=FORMATS, type=click.Choice(FORMATS), show_default=True)
@click.option("--one", nargs=4, hidden=True)
def main(folder: str | None, layers: int, runs: int, names: tuple[str, ...], one: tuple[str, ...] | None) -> None:
    if one:
        print(json.dumps(measure(one[0], *map(Path, one[1:]))))
        return
    rows = list[dict[str, Any]]()
    print(f"{'format':<20}{'file MB':>9}{'floor s':>9}{'load s':>8}{'ratio':>7}{'memory of model':>17}")
    for name in names:
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            file, exact, as_bytes = (
                Path(temporary) / part for part in ("file", "exact.safetensors", "bytes.safetensors")
            )
            size = "wan2.2-ti2v-5b" if name == "Wan 2.2 5B" else "wan2.1-1.3b"
            config = replace(PRESETS[size], num_layers=max(1, layers // 3) if name == "Wan 2.2 5B" else layers)
            save_file({"exact": write(name, file, random_state(name, config), config).contiguous()}, exact)
            save_file({"bytes": torch.ones(bytes_of(file), dtype=torch.uint8)}, as_bytes)
            command = [sys.executable, __file__, "--one", name, *map(str, (file, exact, as_bytes))]
            made = [json.loads(subprocess.check_output(command, text=True).splitlines()[-1]) for _ in range(runs)]
        best = min(made, key=lambda figures: figures["seconds"])
        floor, memory = min(each["floor_s"] for each in made), max(each["memory"] for each in made) / best["model"]
        row = {"format": name, "file_mb": round(best["file"] / 1e6), "floor_s": round(floor, 3)}
        row |= {"seconds": round(best["seconds"], 3), "ratio": round(best["seconds"] / floor, 2)}
        rows.append(row | {"memory_of_model": round(memory, 2)})
        print("{:<20}{:>9}{:>9}{:>8}{:>7}{:>17}".format(*rows[-1].values()))
    print(json.dumps({"layers": layers, "runs": runs, "threads": torch.get_num_threads(), "rows": rows}))


if __name__ == "__main__":
    main()
