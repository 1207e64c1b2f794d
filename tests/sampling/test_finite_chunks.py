"""Numbers that are none end a stream with a sentence, and are looked for without a wait between chunks."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from causalrope_sp import (
    CausalVideoPipeline,
    ConfigError,
    SamplerConfig,
    SequenceParallel,
    StreamConfig,
    sample_chunks,
)
from causalrope_sp.sampling.finite_chunks import FiniteCheck
from causalrope_sp.sampling.steered_loop import SteeredLoop
from causalrope_sp.sampling.stream_options import StreamOptions
from tests.support.sampler_cases import FRAME, GRID, MODEL, make_model, noise_of, text
from tests.support.shell import shell

PROMPT = "a red circle slides right"


def sample(model: Any = MODEL, embeds: Any = None, frames: int = 6, **options: Any) -> list[Any]:
    stream = StreamConfig(chunk_frames=2)
    given = text(1) if embeds is None else embeds
    return list(sample_chunks(model, given.to(model.dtype), noise_of(1), GRID, frames, stream=stream, **options))


def overflowing(dtype: torch.dtype) -> Any:
    """A model whose velocity is beyond float16's range, and within float32's."""
    model = make_model(torch.float64)
    model.head.linear.weight.mul_(1e7)
    return model.to(dtype)


def test_a_float16_model_that_overflows_names_chunk_dtype_and_the_way_out() -> None:
    told = r"chunk 0 has latents that are not finite in float16: .* load it with dtype bfloat16 or float32"
    with pytest.raises(ConfigError, match=told):
        sample(overflowing(torch.float16))
    assert len(sample(overflowing(torch.float32))) == 3


@pytest.mark.parametrize(("broken", "seen"), [(0, 1), (1, 2), (2, 3)])
def test_the_chunk_before_the_last_one_seen_is_named(broken: int, seen: int) -> None:
    """Chunk n is known to be broken once n + 1 is denoised; the last one when the stream ends."""

    def noise(chunk: Any, step: int) -> torch.Tensor:
        drawn = noise_of(1)(chunk, step)
        return drawn if chunk.index < broken else drawn * math.nan

    stream = sample_chunks(MODEL, text(1), noise, GRID, 6, stream=StreamConfig(chunk_frames=2))
    assert [next(stream).chunk.index for _ in range(seen)] == list(range(seen))
    with pytest.raises(ConfigError, match=f"chunk {broken} has latents that are not finite in float64"):
        next(stream)


def test_a_check_is_read_after_the_next_chunk_has_been_denoised(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host has launched all steps of chunk n + 1 by then, so that the device never waits for it."""
    order: list[str] = []
    read = FiniteCheck.read

    def seen(check: FiniteCheck) -> None:
        order.append(f"read {check._chunk}")
        read(check)

    monkeypatch.setattr(FiniteCheck, "read", seen)
    sampler = SamplerConfig(steps=(1000, 500))
    sample(sampler=sampler, on_step=lambda chunk, step, _: order.append(f"step {chunk.index}"))
    chunks = [["step 0"] * 2, ["step 1"] * 2, ["read 0"], ["step 2"] * 2, ["read 1"], ["read 2"]]
    assert order == [event for part in chunks for event in part]


def test_a_broken_chunk_that_is_taken_back_is_forgotten() -> None:
    broken = {1}

    def noise(chunk: Any, step: int) -> torch.Tensor:
        drawn = noise_of(1)(chunk, step)
        return drawn * math.nan if chunk.index in broken else drawn

    options = StreamOptions(stream=StreamConfig(6, chunk_frames=2), history=1, kept_chunks=4)
    loop = SteeredLoop(MODEL, text(1), noise, GRID, None, SequenceParallel.single(device="cpu"), options)
    with torch.inference_mode():
        for _ in range(2):
            loop.step()
        with pytest.raises(ConfigError, match="chunk 1 has latents that are not finite"):
            loop.step()
        broken.clear()
        loop.rewind(1, text(1))
        assert loop.step().latents.isfinite().all()
        assert loop.step().chunk.index == 2


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_given_numbers_that_are_none_are_refused(value: float) -> None:
    broken = text(1)
    broken[0, 1, 2] = value
    with pytest.raises(ConfigError, match=r"^text embeddings must be finite, and hold NaN or infinity in float64"):
        sample(embeds=broken)
    with pytest.raises(ConfigError, match=r"^negative text embeddings must be finite"):
        sample(negative_embeds=broken, sampler=SamplerConfig(guidance_scale=2.0))
    latents = torch.full((1, 2, *FRAME), value)
    with pytest.raises(ConfigError, match=r"^initial latents must be finite"):
        sample(initial_latents=latents)


@pytest.mark.parametrize("decode", ["inline", "overlap", "spatial"])
@pytest.mark.parametrize("frames", [9, 21])
@pytest.mark.parametrize("output_type", ["np", "latent"])
def test_a_pipeline_gives_no_black_video(decode: Any, frames: int, output_type: str) -> None:
    pipe = CausalVideoPipeline.from_pretrained("toybox", device="cpu", dtype="float16", decode=decode)
    pipe.model.head.linear.weight.mul_(1e5)
    with pytest.raises(ConfigError, match=r"chunk \d has latents that are not finite in float16"):
        pipe(PROMPT, num_frames=frames, output_type=output_type)


def test_parallel_chunks_are_checked_too() -> None:
    pipe = CausalVideoPipeline.from_pretrained("toybox-vin", device="cpu", dtype="float16", parallel_chunks="vin")
    pipe.model.head.linear.weight.mul_(1e5)
    with pytest.raises(ConfigError, match="chunk 0 has latents that are not finite in float16"):
        pipe(PROMPT, num_frames=21)


def test_generate_ends_with_the_sentence_and_status_2(tmp_path: Path) -> None:
    """A checkpoint in float16 whose numbers overflow, from the command line."""
    home = tmp_path / "model"
    pipe = CausalVideoPipeline.from_pretrained("toybox", device="cpu")
    for name, parameter in pipe.model.named_parameters():
        if "ffn" in name:
            parameter.mul_(1e3)
    pipe.save_pretrained(home)
    args = ["--base", "toybox", "--dtype", "float16", "--device", "cpu", "--out", tmp_path / "v.mp4", "--json"]
    result = shell("generate", PROMPT, "--model", home, "--frames", 9, *args)
    assert result.exit_code == 2
    assert "latents that are not finite in float16: the model probably leaves float16's range" in result.stderr


def test_embeds_of_a_call_name_the_dtype() -> None:
    pipe = CausalVideoPipeline.from_pretrained("toybox", device="cpu", dtype="float16")
    embeds = torch.full((1, pipe.model.config.text_len, pipe.model.config.text_dim), 1e6)
    with pytest.raises(ConfigError, match=r"text embeddings must be finite in float16, .* bfloat16 or float32"):
        pipe(prompt_embeds=embeds, num_frames=9)
