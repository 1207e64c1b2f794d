"""A whole stream by Triton's kernels, on two ranks."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from causalrope_kernels import backend, reference
from causalrope_sp import DiTConfig, LatentGrid, SamplerConfig, StreamConfig, sample_chunks
from causalrope_sp.config import CacheDtype
from causalrope_sp.diffusion.noise import seeded_noise
from causalrope_sp.distributed import SequenceParallel
from causalrope_sp.distributed.launch import RankPool
from causalrope_sp.heads import HeadPolicy
from causalrope_sp.models.causal_dit import CausalDiT
from causalrope_sp.weights.diffusers_keys import DIFFUSERS
from tests.support.triton_cases import DEVICE, random

pytestmark = pytest.mark.usefixtures("bfloat16_as_on_a_gpu")

HEADS = HeadPolicy(((None, 3, 4), (3, None, 0)), ((None, 1, None), (None, None, None)))


def make_model(dtype: torch.dtype = torch.float32, wide: bool = False) -> CausalDiT:
    """A random model; `wide` keeps in float32 what a mixed checkpoint keeps so."""
    config = DiTConfig(
        dim=60, ffn_dim=40, num_heads=3, num_layers=2, text_dim=8, text_len=5, freq_dim=16, in_channels=2
    )
    torch.manual_seed(0)
    model = CausalDiT(config).to(dtype)
    for parameter, stored in DIFFUSERS.names(config.num_layers).items():
        if wide and DIFFUSERS.keeps_wide(stored[0]):
            model.get_parameter(parameter).data = model.get_parameter(parameter).float()
    return model


def a_video(parallel: SequenceParallel, dtype: torch.dtype, stream: StreamConfig, wide: bool = False) -> Tensor:
    """Three chunks of two frames; the last one evicts."""
    grid, model = LatentGrid(3, 2), make_model(dtype, wide).to(parallel.device)
    chunks = sample_chunks(
        model,
        random(1, 5, 8).to(dtype),
        seeded_noise(0, (1, 2, 6, 4)),
        grid,
        6,
        stream=stream,
        sampler=SamplerConfig(steps=(1000, 500)),
        parallel=parallel,
    )
    return torch.cat([chunk.latents for chunk in chunks], 1)


def by_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "runs_triton", lambda device: True)


def video_by_triton(group: Any, device: str, strategy: str, stream: StreamConfig) -> Tensor:
    with pytest.MonkeyPatch.context() as patch:
        by_triton(patch)
        for name in ("add_norm", "rms_norm", "attention", "attention_lse", "merge"):
            patch.setattr(reference, name, None)  # a call of it would raise
        return a_video(SequenceParallel(group, strategy, device), torch.float32, stream)


@pytest.mark.skipif(DEVICE.type != "cpu", reason="its ranks are processes of this one machine's CPU")
@pytest.mark.parametrize(
    ("strategy", "rope", "cache", "heads"),
    [
        ("ulysses", "absolute", "model", None),
        ("gather-kv", "relative", "model", None),
        ("shard-kv", "absolute", "model", None),
        ("ulysses", "absolute", "int8", None),
        ("gather-kv", "relative", "int8", HEADS),
        ("shard-kv", "absolute", "fp8", HeadPolicy(HEADS.windows)),
    ],
)
def test_a_stream_by_triton_on_two_ranks_is_that_by_torch_on_one(
    pool: RankPool,
    strategy: str,
    rope: Literal["absolute", "relative"],
    cache: CacheDtype,
    heads: HeadPolicy | None,
) -> None:
    """With a cache in 8 bits, numbers that are rounded another way at the border of two show. Beside heads with windows
    of their own, the others may choose frames by similarity."""
    similar = 0 if heads is not None and cache == "fp8" else None
    stream = StreamConfig(window=5, sink=1, chunk_frames=2, rope=rope, cache=cache, heads=heads, similar_frames=similar)
    expected = a_video(SequenceParallel.single(device="cpu"), torch.float64, stream)
    found = pool.run(video_by_triton, 2, strategy, stream)
    assert (found.double() - expected).norm() <= (1e-5 if cache == "model" else 2e-4) * expected.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_stream_of_a_mixed_model_runs_by_triton(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """With the parameters in float32 that a mixed checkpoint keeps so; none of the kernels falls back to torch."""
    stream, alone = StreamConfig(window=5, sink=1, chunk_frames=2), SequenceParallel.single(device=DEVICE)
    expected = a_video(alone, torch.float64, stream)
    by_torch = a_video(alone, dtype, stream, wide=True)
    by_triton(monkeypatch)
    for name in ("add_norm", "rms_norm", "attention"):
        monkeypatch.setattr(reference, name, None)
    found = a_video(alone, dtype, stream, wide=True)
    assert (found.double() - expected).norm() <= 2 * (by_torch.double() - expected).norm()
