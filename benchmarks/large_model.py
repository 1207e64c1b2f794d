"""A large model with random weights, made in little time."""

from __future__ import annotations

import torch

from causalrope_sp.config import DiTConfig
from causalrope_sp.models.causal_dit import CausalDiT


def large_model(config: DiTConfig) -> CausalDiT:
    """Makes a model in bfloat16 whose weights repeat one pattern of random numbers."""
    with torch.device("meta"):
        model = CausalDiT(config).to(torch.bfloat16)
    model.to_empty(device="cpu")
    pattern = torch.randn(1 << 20).to(torch.bfloat16)
    for parameter in model.parameters():
        flat = parameter.data.view(-1)
        for start in range(0, len(flat), len(pattern)):
            flat[start : start + len(pattern)] = pattern[: len(flat) - start]
    return model.requires_grad_(False)
