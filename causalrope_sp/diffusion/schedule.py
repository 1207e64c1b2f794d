"""Flow-matching arithmetic: x_σ = (1-σ)·x0 + σ·ε, velocity v = ε - x0, timestep = 1000·σ. Pure functions.

Noise levels σ are in [0, 1], timesteps in [0, 1000]. Latents and velocities have any shape.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from causalrope_sp.config import SamplerConfig, Solver, TimestepRule
from causalrope_sp.errors import ConfigError

LEAST_DATA = 1e-6  # what diffusers takes off a noise level of 1, at which UniPC's logarithms are infinite


def shift_sigma(sigma: float, shift: float) -> float:
    """Shifts a noise level, σ(s) = shift·s / (1 + (shift - 1)·s), so that more of the steps are at high noise."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def timesteps(
    steps: int | Sequence[float], solver: Solver = "renoise", rule: TimestepRule = "wan"
) -> tuple[float, ...]:
    """Spaces the timesteps of a number of steps evenly from noise to data; the end itself is no step.

    Args:
        steps: their number, or the timesteps themselves, which are returned unchanged.
        solver: "unipc" spaces them by `rule`, the others from 1000 to 0.
        rule: "wan" from 999 to 0, "diffusers" from 1000 to 1.

    Returns:
        Unshifted timesteps, falling.

    Raises:
        ConfigError: the number is below 1 or above 1000.
    """
    if not isinstance(steps, int):
        return tuple(steps)
    if not 1 <= steps <= 1000:
        raise ConfigError(f"steps must be at least 1 and at most 1000, not {steps}")
    if solver == "unipc" and rule == "diffusers":  # in numpy.linspace's order, whose rounding shows once truncated
        return tuple(1000 * (1 + i * ((1 / 1000 - 1) / steps)) for i in range(steps))
    start = 999 if solver == "unipc" else 1000
    return tuple(start * (steps - i) / steps for i in range(steps))


def with_overrides(
    config: SamplerConfig,
    *,
    steps: int | Sequence[float] | None = None,
    solver: Solver | None = None,
    timestep_rule: TimestepRule | None = None,
    shift: float | None = None,
    guidance_scale: float | None = None,
    guidance_interval: tuple[float, float] | None = None,
) -> SamplerConfig:
    """Replaces the values of a sampler by those that are not None.

    Args:
        config: the sampler.
        steps: their number, or unshifted timesteps, of all chunks: `first_steps` are dropped. If only `solver` or
            `timestep_rule` changes, it takes as many steps as before, evenly spaced.
        solver: see `SamplerConfig`.
        timestep_rule: see `SamplerConfig`.
        shift: see `SamplerConfig`.
        guidance_scale: see `SamplerConfig`.
        guidance_interval: see `SamplerConfig`.

    Raises:
        ConfigError: `SamplerConfig` or `timesteps` refuses a value, there is a guidance interval without guidance, or a
            timestep rule without "unipc".
    """
    new_solver, rule = solver or config.solver, timestep_rule or config.timestep_rule
    if timestep_rule is not None and new_solver != "unipc":
        raise ConfigError(f"timestep_rule says nothing with solver {new_solver}: give it with solver unipc")
    if steps is None and (new_solver, rule) != (config.solver, config.timestep_rule):
        steps = len(config.steps)
    overrides = {
        "steps": None if steps is None else timesteps(steps, new_solver, rule),
        "solver": solver,
        "timestep_rule": timestep_rule,
        "shift": shift,
        "guidance_scale": guidance_scale,
        "guidance_interval": guidance_interval,
    }
    changes: dict[str, Any] = {name: value for name, value in overrides.items() if value is not None}
    if steps is not None:
        changes["first_steps"] = ()
    changed = replace(config, **changes)
    if guidance_interval is not None and changed.guidance_scale == 1:
        raise ConfigError("a guidance interval says nothing without a guidance scale other than 1")
    return changed


def sigmas(config: SamplerConfig) -> list[float]:
    """Returns the shifted noise level of every step, falling, without the final 0."""
    levels = [shift_sigma(step / 1000, config.shift) for step in config.steps]
    if config.solver == "unipc" and config.timestep_rule == "diffusers" and 1 - levels[0] < LEAST_DATA:
        levels[0] -= LEAST_DATA
    return levels


def model_timesteps(config: SamplerConfig) -> list[float]:
    """Returns the timestep that the model is called with at every step: 1000·σ, truncated to a whole number for
    "unipc", as both Wan and diffusers do.
    """
    exact = [1000 * sigma for sigma in sigmas(config)]
    return [float(int(t)) for t in exact] if config.solver == "unipc" else exact


def guided_steps(config: SamplerConfig) -> list[bool]:
    """Returns for every step whether it is guided."""
    low, high = config.guidance_interval
    return [config.guidance_scale != 1 and low <= t <= high for t in model_timesteps(config)]


def branch_timesteps(config: SamplerConfig, unconditional: bool = False, first_step: int = 0) -> tuple[float, ...]:
    """Returns the timesteps of a chunk's conditional or unconditional passes.

    Args:
        config: the sampler.
        unconditional: return those of the unconditional passes, which run at guided steps only.
        first_step: the number of the first step to run, counted from 0.
    """
    steps = zip(model_timesteps(config), guided_steps(config), strict=True)
    return tuple(t for t, guided in list(steps)[first_step:] if guided or not unconditional)


def guide(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Applies classifier-free guidance (arXiv 2207.12598) to the velocities of the two forwards."""
    return unconditional + scale * (conditional - unconditional)


def predict_x0(x: Tensor, velocity: Tensor, sigma: float) -> Tensor:
    """Predicts the clean latent from a latent and its velocity at noise level `sigma`."""
    return x - sigma * velocity


def add_noise(x0: Tensor, noise: Tensor, sigma: float) -> Tensor:
    """Mixes a clean latent with noise to noise level `sigma`."""
    return (1 - sigma) * x0 + sigma * noise


def renoise_step(x: Tensor, velocity: Tensor, sigma: float, to: float, fresh: Callable[[], Tensor]) -> Tensor:
    """Steps as Self-Forcing does (arXiv 2506.08009): predicts x0, then adds fresh noise up to noise level `to`."""
    x0 = predict_x0(x, velocity, sigma)
    return add_noise(x0, fresh(), to) if to else x0


def euler_step(x: Tensor, velocity: Tensor, sigma: float, to: float, fresh: Callable[[], Tensor]) -> Tensor:
    """Steps along the flow ODE from noise level `sigma` to `to`, to first order; draws no noise."""
    return x + (to - sigma) * velocity


SOLVERS = {"renoise": renoise_step, "euler": euler_step}
