"""Measures what a bfloat16 forward gains from the parameters that diffusers keeps in float32.

    python benchmarks/mixed_dtypes.py

Random models are saved in float32 in diffusers' layout, and loaded in float64, in bfloat16 with those parameters wide,
and in bfloat16 throughout, as Self-Forcing's code has it. The script prints the relative errors of the embedded
timesteps and of the velocity against float64, then JSON.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import click
import torch
from printed import finish, print_table
from torch import Tensor

from causalrope_sp import CausalDiT, DiTConfig
from causalrope_sp.weights import load_model, save_diffusers

sys.path.insert(0, str(Path(__file__).parent.parent))
from tests.support.checkpoints import run

TIMESTEPS = (937.5, 625.0, 3.0)


def forward(model: CausalDiT, timestep: float, seed: int) -> tuple[Tensor, Tensor]:
    """The embedded timesteps and the velocity of a chunk of 3 frames."""
    seen: list[Tensor] = []
    handle = model.time_projection.register_forward_pre_hook(lambda _, args: seen.append(args[0].double()))
    generator, config = torch.Generator().manual_seed(seed), model.config
    latents = torch.randn(1, config.in_channels, 3, 16, 16, generator=generator)
    text = torch.randn(1, config.text_len, config.text_dim, generator=generator)
    velocity = run(model, latents.to(model.dtype), torch.full((3,), timestep), text.to(model.dtype))
    handle.remove()
    return seen[0], velocity.double()


def errors(folder: Path, seed: int, layers: int) -> list[dict[str, float]]:
    torch.manual_seed(seed)
    config = DiTConfig(dim=512, ffn_dim=2048, num_heads=8, num_layers=layers, text_dim=64, freq_dim=256)
    save_diffusers(CausalDiT(config).requires_grad_(False), folder)
    exact = load_model(folder, dtype=torch.float64)
    models = {"wide": load_model(folder, dtype=torch.bfloat16)}
    models["narrow"] = load_model(folder, dtype=torch.bfloat16).to(torch.bfloat16)
    rows = []
    for timestep in TIMESTEPS:
        truth = forward(exact, timestep, seed)
        row = {"seed": float(seed), "timestep": timestep}
        for name, model in models.items():
            pairs = zip(("time", "velocity"), forward(model, timestep, seed), truth, strict=True)
            row |= {f"{what}_{name}": ((made - true).norm() / true.norm()).item() for what, made, true in pairs}
        rows.append(row)
    return rows


@click.command()
@click.option("--seeds", default=6, show_default=True, help="Measure this many random models.")
@click.option("--layers", default=8, show_default=True, help="Give them this many layers.")
def main(seeds: int, layers: int) -> None:
    """Prints the errors of both models."""
    rows: list[dict[str, float]] = []
    for seed in range(seeds):
        with tempfile.TemporaryDirectory() as folder:
            rows += errors(Path(folder), seed, layers)
    print_table([*rows[0]], [[f"{value:.4g}" for value in row.values()] for row in rows])
    better = sum(row["velocity_wide"] < row["velocity_narrow"] for row in rows)
    gain = 1 - sum(row["velocity_wide"] / row["velocity_narrow"] for row in rows) / len(rows)
    finish("mixed_dtypes", rows=rows, nearer=better, of=len(rows), mean_gain=gain)


if __name__ == "__main__":
    main()
