"""Guidance against one forward over all frames, and what it costs."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from causalrope_sp import ConfigError, SamplerConfig, StreamConfig
from causalrope_sp.diffusion.schedule import add_noise, guided_steps, sigmas
from causalrope_sp.diffusion.solvers import start_solver
from causalrope_sp.grid import split_into_chunks
from causalrope_sp.sampling.stream import CausalStream
from causalrope_sp.sampling.stream_options import Source
from causalrope_sp.verification.reference import block_causal_velocity
from tests.support.guided_runs import GUIDED, MANY, STREAM, negative, sample
from tests.support.sampler_cases import FRAME, GRID, MODEL, noise_of, relative, stream_configs, text
from tests.support.watching import noted


def from_one_forward(
    streamed: Tensor, stream: StreamConfig, sampler: SamplerConfig, redrawn: Tensor | None, begin: int
) -> Tensor:
    """What the solver reaches if every velocity of both prompts comes from one forward over all frames at once, with
    the streamed video as the clean past: that video itself, if each branch's cache holds what it should."""
    batch, frames = streamed.shape[:2]
    cut = split_into_chunks(frames, stream.chunk_frames, independent_first_frame=stream.independent_first_frame)
    chunks, draw, levels = list(cut), noise_of(batch), sigmas(sampler)
    low, high = sampler.guidance_interval

    def noise(step: int) -> Tensor:
        return torch.cat([draw(chunk, step) for chunk in chunks], 1).double()

    def velocity(prompt: Tensor, x: Tensor, t: float) -> Tensor:
        return block_causal_velocity(
            MODEL, prompt, GRID, chunks, streamed, x, t, window=stream.window, sink=stream.sink
        )

    x = noise(0) if redrawn is None else add_noise(redrawn, noise(begin), levels[begin])
    solve = start_solver(sampler, begin)
    for step, sigma in list(enumerate(levels))[begin:]:
        t = float(int(1000 * sigma)) if sampler.solver == "unipc" else 1000 * sigma
        v = velocity(text(batch), x, t)
        if sampler.guidance_scale != 1 and low <= t <= high:
            away = velocity(negative(batch), x, t)
            v = away + sampler.guidance_scale * (v - away)
        x = solve(x, v, sigma, [*levels, 0.0][step + 1], partial(noise, step + 1))
    return x


samplers = st.builds(
    SamplerConfig,
    st.sampled_from([(999.0,), MANY]),
    st.sampled_from([1.0, 5.0]),
    st.sampled_from(["renoise", "euler", "unipc"]),
    st.sampled_from([0.0, 1.0, 2.5]),
    st.sampled_from([(0, 1000), (450, 1000), (0, 999.5), (300, 800)]),
).filter(lambda sampler: sampler.guidance_scale == 1 or any(guided_steps(sampler)))


@given(stream_configs(), samplers, st.integers(1, 7), st.integers(1, 2), st.booleans(), st.data())
@settings(max_examples=40)
def test_both_branches_hold_the_whole_past(
    stream: StreamConfig, sampler: SamplerConfig, frames: int, batch: int, fuse: bool, data: st.DataObject
) -> None:
    options: dict[str, Any] = {"stream": stream, "sampler": sampler, "fuse_context_pass": fuse}
    redrawn, begin = None, data.draw(st.integers(0, len(sampler.steps) - 1))
    if begin:
        drawing = torch.randn(batch, frames, *FRAME, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
        options["source"] = Source(lambda chunk: drawing[:, chunk.start : chunk.stop], begin)
        redrawn = drawing
    streamed = sample(frames, batch, **options)
    assert relative(streamed, from_one_forward(streamed, stream, sampler, redrawn, begin)) < 1e-12


def test_scale_1_is_no_guidance_and_no_second_branch(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = sample(5, stream=STREAM, sampler=replace(GUIDED, guidance_scale=1.0), negative_embeds=None)
    opened: list[CausalStream] = []
    init = noted(CausalStream.__init__, lambda self, *_, **__: opened.append(self))
    monkeypatch.setattr(CausalStream, "__init__", init)
    assert torch.equal(sample(5, stream=STREAM, sampler=replace(GUIDED, guidance_scale=1.0)), plain)
    assert len(opened) == 1
    assert relative(sample(5, stream=STREAM, sampler=GUIDED), plain) > 1e-2
    assert len(opened) == 3


def test_a_negative_prompt_that_is_the_prompt_changes_nothing() -> None:
    plain = sample(5, stream=STREAM, sampler=replace(GUIDED, guidance_scale=1.0))
    assert relative(sample(5, stream=STREAM, sampler=GUIDED, negative_embeds=text(1)), plain) < 1e-13


def test_only_guided_steps_cost_a_second_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[tuple[int, int, float, bool]] = []
    denoise = CausalStream.denoise

    def noting(self: CausalStream, chunk: Any, x: Tensor, timestep: float, context: Any, control: Any) -> Tensor:
        passes.append((id(self), chunk.index, timestep, context is not None))
        return denoise(self, chunk, x, timestep, context, control)

    monkeypatch.setattr(CausalStream, "denoise", noting)
    sampler = replace(GUIDED, shift=1.0, guidance_interval=(400, 700))
    assert guided_steps(sampler) == [False, True, True, False]
    sample(5, stream=STREAM, sampler=sampler)
    conditional = passes[0][0]
    first, second = ([p[1:] for p in passes if (p[0] == conditional) == mine] for mine in (True, False))
    assert first == [(chunk, t, bool(chunk and t == 999)) for chunk in range(3) for t in MANY]
    assert second == [(chunk, t, bool(chunk and t == 700)) for chunk in range(3) for t in MANY[1:3]]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"guidance_scale": -1.0}, "guidance scale must be from 0 to 1000, not -1"),
        ({"guidance_scale": math.nan}, "guidance scale must be from 0 to 1000"),
        ({"shift": math.inf}, "shift must be from 0.001 to 1000, not inf"),
        ({"shift": 1e-320}, "shift must be from 0.001 to 1000"),
        ({"guidance_interval": (500, 400)}, "guidance is within an interval of timesteps 0 to 1000, not"),
        ({"guidance_interval": (0, 1001)}, "guidance is within an interval"),
        ({"guidance_interval": (1.0,)}, "guidance is within an interval"),
        ({"steps": (1000, 500)}, "unipc cannot start at 1000"),
    ],
)
def test_guidance_that_is_nonsense_is_refused(change: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        replace(GUIDED, **change)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"negative_embeds": None}, "a guidance scale of 2.5 needs the embeddings of a negative prompt"),
        ({"negative_embeds": negative(2)}, r"negative embeddings have shape \(2, 3, 8\), the prompt's \(1, 3, 8\)"),
        (
            {"sampler": replace(GUIDED, guidance_interval=(0, 0.5))},
            "no step is within the guidance interval 0 to 0.5; ",
        ),
    ],
)
def test_a_stream_that_cannot_be_guided_is_refused(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        sample(3, **({"sampler": GUIDED} | options))
