"""Measures the two ways in which a LoRA can act on a model whose weights change between two chunks: merged, which costs
time once for each change, and computed beside the weights, which costs time in every pass.

    OMP_NUM_THREADS=1 python benchmarks/live_lora.py [--rank 32] [--tokens 1560] [--rounds 5]

First toybox, by its own calls, against the time of a chunk; then one block of Wan 2.1 1.3B, for a pass over so many
tokens (1560 are one latent frame of 480×832). Gate: the merged weights are those of loading with the LoRA, and the
product beside the weights is that of the merged ones to rounding. Medians of processor time of one thread; the last
line is JSON.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import torch
from large_model import large_model
from printed import finish, print_table
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import linear

from causalrope_sp import CausalVideoPipeline
from causalrope_sp.config import PRESETS
from causalrope_sp.models.causal_dit import CausalDiT
from causalrope_sp.weights import load_model, save_model
from causalrope_sp.weights.dit_loader import Remerge

PROMPT = "a red circle slides right"


def median_of(rounds: int, run: Callable[[], Any]) -> float:
    """The median of the processor's seconds."""
    times = []
    for _ in range(rounds):
        started = time.process_time()
        run()
        times.append(time.process_time() - started)
    return statistics.median(times)


def matrices(model: CausalDiT) -> dict[str, nn.Linear]:
    """The matrices of the blocks, by the names that a LoRA file has for them."""
    fused = {"self_attn.qkv": "self_attn.to_qkv", "cross_attn.kv": "attn2.to_kv"}
    linears = {name: each for name, each in model.named_modules() if isinstance(each, nn.Linear) and "blocks" in name}
    spelled = {"self_attn.out": "self_attn.o", "cross_attn.out": "cross_attn.o", "ffn.up": "ffn.0", "ffn.down": "ffn.2"}
    found = {}
    for name, each in linears.items():
        for own, theirs in (fused | spelled).items():
            name = name.replace(own, theirs) if name.endswith(own) else name
        found[name] = each
    return found


def write_lora(model: CausalDiT, rank: int, file: Path) -> Path:
    """Writes a random LoRA of every matrix of the blocks."""
    state: dict[str, Tensor] = {}
    for name, module in matrices(model).items():
        outputs, inputs = module.weight.shape
        state[f"{name}.lora_A.weight"] = torch.randn(rank, inputs) / inputs**0.5
        state[f"{name}.lora_B.weight"] = 0.01 * torch.randn(outputs, rank)
    save_file(state, file)
    return file


def of_toybox(rank: int, rounds: int, folder: Path) -> dict[str, float]:
    """Seconds of a chunk, and of a change of the weight of a LoRA in an open session."""
    pipe = CausalVideoPipeline.from_pretrained("toybox", device="cpu")
    lora = write_lora(pipe.model, rank, folder / "toybox.safetensors")
    session = pipe.open(PROMPT, seed=0)
    for _ in range(7):
        session.step()
    pipe.load_lora_weights(lora, "style")
    expected = CausalVideoPipeline.from_pretrained("toybox", device="cpu", loras=[lora]).model.state_dict()
    assert all(torch.equal(x, expected[name]) for name, x in pipe.model.state_dict().items()), "other weights"
    chunk = median_of(rounds, session.step)
    weights = iter(range(1, 1000))

    def change(recache: bool) -> None:
        pipe.set_adapters("style", next(weights) / 1000, recache=recache)
        if not recache:
            session.step()  # so that a context pass is pending the next time

    return {
        "chunk": chunk,
        "change": median_of(rounds, lambda: change(False)) - chunk,
        "change, recached": median_of(rounds, lambda: change(True)),
    }


def of_a_block(rank: int, tokens: int, rounds: int, folder: Path) -> dict[str, float]:
    """Seconds of one block of 1.3B: its change, and its matrices with and without the LoRA beside them."""
    config = replace(PRESETS["wan2.1-1.3b"], num_layers=1)
    save_model(large_model(config), folder / "block.safetensors")
    model = load_model(folder / "block.safetensors", dtype=torch.float32)
    lora = write_lora(model, rank, folder / "block_lora.safetensors")
    linears = list(matrices(model).values())
    factors = [(torch.randn(rank, m.weight.shape[1]), torch.randn(m.weight.shape[0], rank)) for m in linears]
    inputs = [torch.randn(tokens, m.weight.shape[1]) for m in linears]

    def merge() -> None:
        Remerge(model, folder / "block.safetensors", [lora]).write(())

    def plain() -> list[Tensor]:
        return [linear(x, m.weight, m.bias) for x, m in zip(inputs, linears, strict=True)]

    def beside() -> list[Tensor]:
        pairs = zip(plain(), inputs, factors, strict=True)
        return [y.addmm_(linear(x, down), up.T) for y, x, (down, up) in pairs]

    merged = [linear(x, m.weight + u @ d, m.bias) for x, m, (d, u) in zip(inputs, linears, factors, strict=True)]
    for one, other in zip(beside(), merged, strict=True):
        assert (one - other).abs().max() <= 1e-4 * other.abs().max(), "other products"
    change, alone = median_of(rounds, merge), median_of(rounds, plain)
    expected = load_model(folder / "block.safetensors", dtype=torch.float32, loras=[lora]).state_dict()
    assert all(torch.equal(x, expected[name]) for name, x in model.state_dict().items()), "other weights"
    numbers = sum(m.weight.numel() for m in linears)
    extra = sum(rank * sum(m.weight.shape) for m in linears)
    return {
        "change": change,
        "matrices": alone,
        "matrices, LoRA beside": median_of(rounds, beside),
        "floor of beside": alone * extra / numbers,
    }


@click.command()
@click.option("--rank", default=32, show_default=True, type=click.IntRange(min=1))
@click.option("--tokens", default=1560, show_default=True, type=click.IntRange(min=1))
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(min=1))
def main(rank: int, tokens: int, rounds: int) -> None:
    """Measures both ways on toybox and on one block of Wan 2.1 1.3B."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as temporary, torch.inference_mode():
        toybox = of_toybox(rank, rounds, Path(temporary))
        block = of_a_block(rank, tokens, rounds, Path(temporary))
    rows = [("toybox", what, f"{1000 * seconds:.1f}") for what, seconds in toybox.items()]
    rows += [("block of 1.3B", what, f"{1000 * seconds:.1f}") for what, seconds in block.items()]
    print_table(("model", "work", "ms"), rows)
    extra = block["matrices, LoRA beside"] - block["matrices"]
    passes = block["change"] / extra
    print(f"beside the weights costs {extra / block['matrices']:.1%} of a pass's matrices; a change costs as much as")
    print(f"{passes:.1f} passes over {tokens} tokens with the LoRA beside them")
    finish("live_lora", toybox=toybox, block=block, rank=rank, tokens=tokens, passes_to_pay=round(passes, 2))


if __name__ == "__main__":
    main()
