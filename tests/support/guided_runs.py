"""Guided videos of the small model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from causalrope_sp import SamplerConfig, StreamConfig
from tests.support.sampler_cases import CONFIG, GRID, MODEL, noise_of, text
from tests.support.streams import run_chunks

MANY = (999.0, 700.0, 400.0, 100.0)


def negative(batch: int = 1) -> Tensor:
    return torch.randn(batch, CONFIG.text_len, CONFIG.text_dim, generator=torch.Generator().manual_seed(7)).double()


def sample(frames: int, batch: int = 1, **options: Any) -> Tensor:
    options = {"negative_embeds": negative(batch)} | options
    chunks = run_chunks(MODEL, text(batch), noise_of(batch), GRID, frames, **options)
    return torch.cat([chunk.latents for chunk in chunks], 1)


GUIDED = SamplerConfig(MANY, 5.0, "unipc", 2.5)
STREAM = StreamConfig(window=5, sink=1, chunk_frames=2)
