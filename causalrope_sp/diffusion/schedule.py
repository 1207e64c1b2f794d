"""Flow-matching arithmetic: x_σ = (1-σ)·x0 + σ·ε, velocity v = ε - x0, timestep = 1000·σ. Pure functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from causalrope_sp.config import SamplerConfig, Solver
from causalrope_sp.errors import ConfigError


def shift_sigma(sigma: float, shift: float) -> float:
    """σ(s) = shift·s / (1 + (shift - 1)·s): spends more of the steps at high noise."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def timesteps(steps: int | Sequence[float], solver: Solver = "renoise") -> tuple[float, ...]:
    """The unshifted timesteps of so many steps, evenly spaced from noise to data; a list of them as it is. Those of
    "unipc" start at 999, as Wan's do.

    Raises:
        ConfigError: fewer than 1 step or more than 1000.
    """
    if not isinstance(steps, int):
        return tuple(steps)
    if not 1 <= steps <= 1000:
        raise ConfigError(f"steps must be at least 1 and at most 1000, not {steps}")
    start = 999 if solver == "unipc" else 1000
    return tuple(start * (steps - i) / steps for i in range(steps))


def with_overrides(
    config: SamplerConfig,
    *,
    steps: int | Sequence[float] | None = None,
    solver: Solver | None = None,
    shift: float | None = None,
    guidance_scale: float | None = None,
    guidance_interval: tuple[float, float] | None = None,
) -> SamplerConfig:
    """The sampler with whatever is not None in place of its own. Another solver without steps takes as many as there
    were, evenly spaced.

    Raises:
        ConfigError: what `SamplerConfig` and `timesteps` refuse; an interval to guide in where nothing is guided.
    """
    way = solver or config.solver
    if steps is None and way != config.solver:
        steps = len(config.steps)
    given = {
        "steps": None if steps is None else timesteps(steps, way),
        "solver": solver,
        "shift": shift,
        "guidance_scale": guidance_scale,
        "guidance_interval": guidance_interval,
    }
    changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    changed = replace(config, **changes)
    if guidance_interval is not None and changed.guidance_scale == 1:
        raise ConfigError("a guidance interval says nothing without a guidance scale other than 1")
    return changed


def sigmas(config: SamplerConfig) -> list[float]:
    """The noise level of every step, shifted, falling, without the final 0."""
    return [shift_sigma(step / 1000, config.shift) for step in config.steps]


def model_timesteps(config: SamplerConfig) -> list[float]:
    """The timestep that the model is told at every step: 1000·σ, of which Wan's UniPC keeps the whole part.

    diffusers keeps the same part of its own rounding of 1000·σ: at shift 1, where that may be a whole number, it may
    be one less.
    """
    told = [1000 * sigma for sigma in sigmas(config)]
    return [float(int(t)) for t in told] if config.solver == "unipc" else told


def guided_steps(config: SamplerConfig) -> list[bool]:
    """Whether a step is guided, for every step."""
    low, high = config.guidance_interval
    return [config.guidance_scale != 1 and low <= t <= high for t in model_timesteps(config)]


def branch_timesteps(config: SamplerConfig, negative: bool = False, first_step: int = 0) -> tuple[float, ...]:
    """Those of a chunk's passes from a step on: all of them for the prompt, the guided ones for the negative prompt."""
    steps = zip(model_timesteps(config), guided_steps(config), strict=True)
    return tuple(t for t, guided in list(steps)[first_step:] if guided or not negative)


def guide(conditional: Tensor, negative: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance of a velocity (arXiv 2207.12598): away from the negative prompt's."""
    return negative + scale * (conditional - negative)


def predict_x0(x: Tensor, velocity: Tensor, sigma: float) -> Tensor:
    """The clean latent that a velocity at noise level sigma points to."""
    return x - sigma * velocity


def add_noise(x0: Tensor, noise: Tensor, sigma: float) -> Tensor:
    """The latent at noise level sigma between a clean one and noise."""
    return (1 - sigma) * x0 + sigma * noise


def renoise_step(x: Tensor, velocity: Tensor, sigma: float, to: float, fresh: Callable[[], Tensor]) -> Tensor:
    """Self-Forcing's few-step update: jump to x0, then back up to level `to` with fresh noise."""
    x0 = predict_x0(x, velocity, sigma)
    return add_noise(x0, fresh(), to) if to else x0


def euler_step(x: Tensor, velocity: Tensor, sigma: float, to: float, fresh: Callable[[], Tensor]) -> Tensor:
    """One step along the flow ODE; draws no noise."""
    return x + (to - sigma) * velocity


SOLVERS = {"renoise": renoise_step, "euler": euler_step}
