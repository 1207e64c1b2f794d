"""Videos of a small model whose passes run by graphs on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from causalrope_sp import SamplerConfig, StreamConfig
from causalrope_sp.diffusion.noise import seeded_noise
from causalrope_sp.distributed.communicator import Communicator
from causalrope_sp.models.causal_dit import CausalDiT
from causalrope_sp.sampling import chunk_loop
from causalrope_sp.sampling.pass_graphs import Capture, PassGraphs
from tests.support.cpu_graph import capture_on_cpu
from tests.support.reuse_cases import CONFIG, GRID, make_model, random
from tests.support.streams import run_chunks

FRAMES, STEPS = 16, (1000.0, 750.0, 400.0)
NOISE = seeded_noise(0, (1, CONFIG.in_channels, GRID.latent_height, GRID.latent_width))


def video(stream: StreamConfig, model: CausalDiT | None = None, frames: int = FRAMES, **options: Any) -> Tensor:
    """Eight chunks of two frames, or fewer."""
    embeds, negative = random(2, 1, CONFIG.text_len, CONFIG.text_dim)
    options = {"sampler": SamplerConfig(steps=STEPS), "negative_embeds": negative} | options
    chunks = run_chunks(model or make_model(), embeds, NOISE, GRID, frames, stream=stream, **options)
    return torch.cat([chunk.latents for chunk in chunks], 1)


def install(patch: pytest.MonkeyPatch, capture: Capture = capture_on_cpu) -> list[PassGraphs]:
    """Lets streams capture graphs on the CPU, and returns those that they make."""
    made: list[PassGraphs] = []

    def stream_graphs(device: torch.device, communicator: Communicator | None) -> PassGraphs:
        made.append(PassGraphs(capture, device, communicator))
        return made[-1]

    patch.setattr(chunk_loop, "stream_graphs", stream_graphs)
    return made


Install = Callable[..., list[PassGraphs]]
