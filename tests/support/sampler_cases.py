"""A small model, its text and noise, and streams of any configuration."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

from causalrope_sp import DiTConfig, LatentGrid, StreamConfig
from causalrope_sp.diffusion.noise import Noise, seeded_noise
from causalrope_sp.models.causal_dit import CausalDiT

CONFIG = DiTConfig(dim=24, ffn_dim=32, num_heads=2, num_layers=2, text_dim=8, text_len=3, freq_dim=16, in_channels=2)
GRID = LatentGrid(2, 3)
FRAME = (CONFIG.in_channels, GRID.latent_height, GRID.latent_width)


def make_model(dtype: torch.dtype = torch.float64) -> CausalDiT:
    """Small, random, and with weights large enough that who attends whom shows in the result."""
    torch.manual_seed(0)
    model = CausalDiT(CONFIG).double().eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.mul_(1.5)
    return model.to(dtype)


MODEL = make_model()


def text(batch: int) -> Tensor:
    return torch.randn(batch, CONFIG.text_len, CONFIG.text_dim, generator=torch.Generator().manual_seed(1)).double()


def noise_of(batch: int, seed: int = 0) -> Noise:
    return seeded_noise(seed, (batch, *FRAME))


def relative(result: Tensor, expected: Tensor) -> float:
    return ((result - expected).norm() / expected.norm()).item()


@st.composite
def stream_configs(draw: st.DrawFn) -> StreamConfig:
    chunk, sink = draw(st.integers(1, 3)), draw(st.integers(0, 2))
    window = draw(st.none() | st.integers(chunk + sink, chunk + sink + 3))
    return StreamConfig(window, sink, chunk, draw(st.booleans()))
