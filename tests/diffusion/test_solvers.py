"""The solvers of many steps against diffusers."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from torch import Tensor

from causalrope_sp import ConfigError, SamplerConfig
from causalrope_sp.config import TimestepRule
from causalrope_sp.diffusion.schedule import model_timesteps, sigmas, timesteps, with_overrides
from causalrope_sp.diffusion.solvers import start_solver
from tests.support.guided_runs import GUIDED, sample
from tests.support.published_folders import wan_pipeline
from tests.support.sampler_cases import relative
from tests.support.text_files import WIDTH


def run(solve: Callable[[Tensor, Tensor, int], Tensor], dtype: torch.dtype, steps: int) -> Tensor:
    """A flow that bends, from noise to wherever the solver leads."""
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(dtype)
    for step in range(steps):
        x = solve(x, torch.sin(3 * x) + x.roll(1, -1), step)
    return x


def ours(config: SamplerConfig, dtype: torch.dtype) -> Tensor:
    solve, levels = start_solver(config), [*sigmas(config), 0.0]
    return run(lambda x, v, n: solve(x, v, levels[n], levels[n + 1], lambda: x), dtype, len(config.steps))


def unipc(steps: int, shift: float, rule: TimestepRule) -> SamplerConfig:
    return SamplerConfig(timesteps(steps, "unipc", rule), shift, "unipc", timestep_rule=rule)


def diffusers_unipc(shift: float) -> UniPCMultistepScheduler:
    """The scheduler of Wan's folders at diffusers; its noise levels are float32."""
    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)


@pytest.mark.parametrize("rule", get_args(TimestepRule))
@pytest.mark.parametrize(("steps", "shift"), [(1, 5.0), (2, 1.0), (8, 5.0), (50, 3.0)])
def test_unipc_is_diffusers(steps: int, shift: float, rule: TimestepRule) -> None:
    """The update is diffusers' under both rules: under its own as it is, under Wan's with Wan's levels handed to it."""
    config, theirs = unipc(steps, shift, rule), diffusers_unipc(shift)
    theirs.set_timesteps(**({"num_inference_steps": steps} if rule == "diffusers" else {"sigmas": wan_sigmas(steps)}))
    assert theirs.timesteps.tolist() == model_timesteps(config)
    told = [*theirs.timesteps]
    expected = run(lambda x, v, n: theirs.step(v, told[n], x).prev_sample, torch.float64, steps)
    assert relative(ours(config, torch.float64), expected) < 1e-5
    assert relative(ours(config, torch.float32).double(), ours(config, torch.float64)) < 1e-5
    assert ours(config, torch.float32).dtype == torch.float32


def test_the_rule_of_diffusers_is_its_pipelines(tmp_path: Path) -> None:
    """The real `WanPipeline`: the timesteps that it tells its transformer, and the latents that it ends with."""
    pipe = wan_pipeline(tmp_path, flow_shift=5.0)
    pipe.set_progress_bar_config(disable=True)
    told: list[float] = []
    pipe.transformer.register_forward_pre_hook(
        lambda _, args, given: told.append(float(given["timestep"][0])), with_kwargs=True
    )
    noise = torch.randn(1, 16, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    embeds = torch.randn(1, 5, WIDTH, generator=torch.Generator().manual_seed(1))
    expected = pipe(
        prompt_embeds=embeds, latents=noise, height=32, width=32, num_frames=1, guidance_scale=1.0,
        num_inference_steps=4, output_type="latent",
    ).frames  # fmt: skip
    config = unipc(4, 5.0, "diffusers")
    assert told == [999, 937, 833, 625] == model_timesteps(config)
    assert model_timesteps(unipc(4, 5.0, "wan")) == [999, 937, 833, 624]
    solve, levels, x = start_solver(config), [*sigmas(config), 0.0], noise
    for t, sigma, to in zip(told, levels, levels[1:]):
        with torch.no_grad():
            velocity = pipe.transformer(
                hidden_states=x, timestep=torch.tensor([t]), encoder_hidden_states=embeds, return_dict=False
            )[0]
        x = solve(x, velocity, sigma, to, lambda: noise)
    assert relative(x, expected) < 1e-5


def unipc_by_hand(config: SamplerConfig) -> Callable[[Tensor, Tensor, int], Tensor]:
    """UniPC of order 2 with B(h) = e^h - 1 (arXiv 2302.04867), its coefficients in Python's floats."""
    levels = [*sigmas(config), 0.0]
    past: list[tuple[Tensor, Tensor, int]] = []  # (x, x0, order) of each step

    def log_snr(sigma: float) -> float:
        return math.log(1 - sigma) - math.log(sigma) if sigma else math.inf

    def solve(x: Tensor, v: Tensor, n: int) -> Tensor:
        x0 = x - levels[n] * v
        if past:  # correct what the last step predicted
            last, m0, order = past[-1]
            h = log_snr(levels[n]) - log_snr(levels[n - 1])
            phi1 = math.expm1(-h)
            base = levels[n] / levels[n - 1] * last - (1 - levels[n]) * phi1 * m0
            if order == 1:
                res = 0.5 * (x0 - m0)
            else:
                r = (log_snr(levels[n - 2]) - log_snr(levels[n - 1])) / h
                phi2 = phi1 / -h - 1
                b = phi2 / phi1, 2 * (phi2 / -h - 0.5) / phi1
                first = (b[1] - b[0]) / (r - 1)
                res = first * (past[-2][1] - m0) / r + (b[0] - first) * (x0 - m0)
            x = base - (1 - levels[n]) * phi1 * res
        order = min(2, len(config.steps) - n, len(past) + 1)
        past.append((x, x0, order))
        if not levels[n + 1]:
            return x0
        h = log_snr(levels[n + 1]) - log_snr(levels[n])
        phi1 = math.expm1(-h)
        made = levels[n + 1] / levels[n] * x - (1 - levels[n + 1]) * phi1 * x0
        if order == 2:
            r = (log_snr(levels[n - 1]) - log_snr(levels[n])) / h
            made = made - (1 - levels[n + 1]) * phi1 * 0.5 * (past[-2][1] - x0) / r
        return made

    return solve


def wan_sigmas(steps: int) -> np.ndarray:
    """The unshifted levels of Wan's own FlowUniPCMultistepScheduler; it keeps its first one in float32."""
    return np.linspace(float(np.float32(0.999)), 0, steps + 1)[:-1]


@pytest.mark.parametrize("shift", [1.0, 2.0, 3.0, 5.0, 8.0])
def test_the_model_is_told_the_timesteps_of_the_rule(shift: float) -> None:
    theirs = diffusers_unipc(shift)
    for steps in range(1, 101):
        levels = wan_sigmas(steps)
        told = (1000 * (shift * levels / (1 + (shift - 1) * levels))).astype(np.int64)  # by Wan's own formula
        assert told.tolist() == model_timesteps(unipc(steps, shift, "wan"))
        theirs.set_timesteps(steps)
        assert theirs.timesteps.tolist() == model_timesteps(unipc(steps, shift, "diffusers"))


def test_the_rules_differ() -> None:
    for steps, differ in ((4, 1), (50, 27)):
        pairs = zip(*(model_timesteps(unipc(steps, 5.0, rule)) for rule in get_args(TimestepRule)), strict=True)
        assert sum(wan != diffusers for wan, diffusers in pairs) == differ


@pytest.mark.parametrize("rule", get_args(TimestepRule))
@pytest.mark.parametrize("steps", [1, 2, 3, 8, 50])
def test_unipc_is_float64_throughout(steps: int, rule: TimestepRule) -> None:
    config = unipc(steps, 5.0, rule)
    assert relative(ours(config, torch.float64), run(unipc_by_hand(config), torch.float64, steps)) < 1e-12


def test_unipc_that_begins_late_is_unipc_of_the_steps_that_are_left() -> None:
    x = torch.randn(1, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    config = unipc(8, 5.0, "wan")
    left = replace(config, steps=config.steps[3:])
    late, fresh = start_solver(config, 3), start_solver(left)
    one, other, levels = x, x, [*sigmas(left), 0.0]
    for sigma, to in itertools.pairwise(levels):
        one = late(one, torch.sin(3 * one), sigma, to, lambda: x)
        other = fresh(other, torch.sin(3 * other), sigma, to, lambda: x)
    assert torch.equal(one, other)


def test_euler_is_diffusers() -> None:
    config = SamplerConfig(timesteps(20), 5.0, "euler")
    theirs = FlowMatchEulerDiscreteScheduler(shift=5.0)
    theirs.set_timesteps(sigmas=[step / 1000 for step in config.steps])
    told = [*theirs.timesteps]
    expected = run(lambda x, v, n: theirs.step(v, told[n], x).prev_sample, torch.float32, 20)
    assert relative(ours(config, torch.float32), expected) < 1e-5


def test_euler_takes_the_steps_of_diffusers_where_they_are_given() -> None:
    """diffusers shifts the last of its steps twice; docs/from_diffusers.md lists them before the shift."""
    theirs = FlowMatchEulerDiscreteScheduler(shift=5.0)
    theirs.set_timesteps(4)
    told = model_timesteps(SamplerConfig((1000, 668.327, 336.653, 4.98008), 5.0, "euler"))
    assert told == pytest.approx(theirs.timesteps.tolist(), rel=1e-5)
    assert told == pytest.approx([1000, 909.707, 717.317, 24.414], abs=1e-3)


def test_only_unipc_needs_diffusers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert sample(3, sampler=SamplerConfig((1000, 500), guidance_scale=2.0)).isfinite().all()
    with pytest.raises(ConfigError, match="unipc needs diffusers, which is not installed"):
        sample(3, sampler=GUIDED)


def test_another_solver_takes_as_many_steps() -> None:
    config = with_overrides(SamplerConfig(), solver="unipc", guidance_scale=3.0)
    assert config.steps == (999, 749.25, 499.5, 249.75)
    assert with_overrides(config, guidance_interval=(0, 500)).steps == config.steps
    assert with_overrides(config, steps=2).steps == (999, 499.5)
    assert with_overrides(SamplerConfig(), steps=(900, 20), solver="unipc").steps == (900, 20)


def test_another_rule_spaces_as_many_steps_anew() -> None:
    config = with_overrides(SamplerConfig(), solver="unipc", timestep_rule="diffusers")
    assert config == unipc(4, 5.0, "diffusers")
    assert with_overrides(config, steps=50) == unipc(50, 5.0, "diffusers")
    assert with_overrides(config, timestep_rule="wan") == unipc(4, 5.0, "wan")
    assert with_overrides(config, solver="euler").steps == (1000, 750, 500, 250)
    assert with_overrides(config, steps=(1000, 20)).steps == (1000, 20)  # the first level is lowered
    with pytest.raises(ConfigError, match="timestep_rule says nothing with solver renoise"):
        with_overrides(SamplerConfig(), timestep_rule="diffusers")
    with pytest.raises(ConfigError, match="timestep_rule must be one of wan, diffusers, not 'trailing'"):
        SamplerConfig(timestep_rule="trailing")  # type: ignore[arg-type]
