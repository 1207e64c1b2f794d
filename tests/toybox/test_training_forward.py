"""Training's forward, one masked sequence, against the stream that generation runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from causalrope_sp.config import SamplerConfig
from causalrope_sp.grid import LatentGrid
from causalrope_sp.sampling.sampler import sample_chunks
from causalrope_sp.toybox import WEIGHTS
from causalrope_sp.toybox.chart import chart
from causalrope_sp.toybox.prompts import parse_prompt
from causalrope_sp.toybox.toybox_text import encode_scene
from causalrope_sp.weights import load_model
from tests.support.paths import ROOT

PROMPTS = ("a red circle bounces and a blue square slides right", "a small green triangle pulses on a light background")
FIRST_STEP = SamplerConfig(steps=(1000,), shift=1.0)


@torch.inference_mode()
def test_training_computes_what_the_stream_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """The velocity of the first chunk, of later ones within the window and past it, and of one after a lone picture."""
    monkeypatch.syspath_prepend(ROOT / "examples")
    from toybox_training.dit import CHUNK, STREAM, Batch, TeacherForcing

    monkeypatch.setattr("toybox_training.dit.BF16", torch.float32)
    grid, generator = LatentGrid.from_pixels(64, 64, 8), torch.Generator().manual_seed(3)
    forcing, model = TeacherForcing(grid, torch.device("cpu")), load_model(WEIGHTS / "toybox.safetensors").float()
    embeds = torch.stack([encode_scene(parse_prompt(p), torch.rand(6, generator=generator)) for p in PROMPTS])
    noise = torch.randn(2, CHUNK, 16, 8, 8, generator=generator)
    for sizes, numbers in (([CHUNK] * 5, [0, 1, 5]), ([1], [1])):
        history = torch.randn(2, sum(sizes), 16, 8, 8, generator=generator)
        noisy, times = noise.repeat(1, len(numbers), 1, 1, 1), torch.ones(2, len(numbers))
        with torch.compiler.set_stance("force_eager"):
            batch = Batch(history, sizes, noisy, noisy, numbers, times, embeds)
            velocity = forcing.velocity(model, batch, noisy)
        for number, found in zip(numbers, velocity.split(CHUNK, 1), strict=True):
            initial = torch.cat([chart(2, 16, 8, 8), history[:, : sum(sizes[:number])]], 1)
            options: dict[str, Any] = {"stream": STREAM, "sampler": FIRST_STEP, "initial_latents": initial}
            (chunk,) = sample_chunks(model, embeds, lambda *_: noise, grid, CHUNK, **options)
            expected = noise - chunk.latents  # one step leads from pure noise to the clean latents
            assert (found - expected).norm() < 1e-5 * expected.norm()
