"""The solvers of many steps against diffusers."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from torch import Tensor

from causalrope_sp import ConfigError, SamplerConfig
from causalrope_sp.diffusion.schedule import model_timesteps, sigmas, timesteps, with_overrides
from causalrope_sp.diffusion.solvers import start_solver
from tests.support.guided_runs import GUIDED, sample
from tests.support.sampler_cases import relative


def run(solve: Callable[[Tensor, Tensor, int], Tensor], dtype: torch.dtype, steps: int) -> Tensor:
    """A flow that bends, from noise to wherever the solver leads."""
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(dtype)
    for step in range(steps):
        x = solve(x, torch.sin(3 * x) + x.roll(1, -1), step)
    return x


def ours(config: SamplerConfig, dtype: torch.dtype) -> Tensor:
    solve, levels = start_solver(config), [*sigmas(config), 0.0]
    return run(lambda x, v, n: solve(x, v, levels[n], levels[n + 1], lambda: x), dtype, len(config.steps))


@pytest.mark.parametrize(("steps", "shift"), [(1, 5.0), (2, 1.0), (8, 5.0), (50, 3.0)])
def test_unipc_is_diffusers(steps: int, shift: float) -> None:
    """As Wan's pipeline there calls it, noise levels in float32."""
    config = SamplerConfig(timesteps(steps, "unipc"), shift, "unipc")
    theirs = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
    theirs.set_timesteps(sigmas=np.linspace(0.999, 0, steps + 1)[:-1])
    assert theirs.timesteps.tolist() == model_timesteps(config)
    told = [*theirs.timesteps]
    expected = run(lambda x, v, n: theirs.step(v, told[n], x).prev_sample, torch.float64, steps)
    assert relative(ours(config, torch.float64), expected) < 1e-5
    assert relative(ours(config, torch.float32).double(), ours(config, torch.float64)) < 1e-5
    assert ours(config, torch.float32).dtype == torch.float32


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


@pytest.mark.parametrize("shift", [2.0, 3.0, 5.0, 8.0])
def test_the_model_is_told_what_diffusers_tells_it(shift: float) -> None:
    theirs = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
    for steps in range(1, 101):
        theirs.set_timesteps(sigmas=np.linspace(0.999, 0, steps + 1)[:-1])
        assert theirs.timesteps.tolist() == model_timesteps(SamplerConfig(timesteps(steps, "unipc"), shift, "unipc"))


@pytest.mark.parametrize("steps", [1, 2, 3, 8, 50])
def test_unipc_is_float64_throughout(steps: int) -> None:
    config = SamplerConfig(timesteps(steps, "unipc"), 5.0, "unipc")
    assert relative(ours(config, torch.float64), run(unipc_by_hand(config), torch.float64, steps)) < 1e-12


def test_unipc_that_begins_late_is_unipc_of_the_steps_that_are_left() -> None:
    x = torch.randn(1, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    config = SamplerConfig(timesteps(8, "unipc"), 5.0, "unipc")
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
