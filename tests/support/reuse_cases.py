"""A small model, its stream, and policies of reuse."""

from __future__ import annotations

import torch
from torch import Tensor

from causalrope_sp import CausalDiT, DiTConfig, LatentGrid, SamplerConfig, StreamConfig
from causalrope_sp.reuse import After, Broadcast, ReusePolicy

CONFIG = DiTConfig(dim=36, ffn_dim=48, num_heads=6, num_layers=2, text_dim=8, text_len=3, freq_dim=16, in_channels=2)
GRID = LatentGrid(1, 7)  # seven tokens are even nowhere
STREAM = StreamConfig(window=6, chunk_frames=2)
SAMPLER = SamplerConfig(tuple(1000 - 125.0 * n for n in range(8)), shift=1.0, solver="euler")
TIMESTEPS = SAMPLER.steps
MIXED = ReusePolicy(
    (
        Broadcast("self", 2, (100, 800)),
        Broadcast("cross", 3, steps=(1, 7), layers=(1,)),
        After("mlp", (750, 400), 2, (0,)),
    )
)
SHARED = ReusePolicy((Broadcast("self", 3), Broadcast("cross", 4)))


def make_model(dtype: torch.dtype = torch.float64) -> CausalDiT:
    torch.manual_seed(0)
    model = CausalDiT(CONFIG).double().eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.mul_(1.5)
    return model.to(dtype)


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
