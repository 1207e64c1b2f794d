"""Flow-matching arithmetic: x_σ = (1-σ)·x0 + σ·ε, velocity v = ε - x0, timestep = 1000·σ. Pure functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from causalrope_sp.config import SamplerConfig
from causalrope_sp.errors import ConfigError


def shift_sigma(sigma: float, shift: float) -> float:
    """σ(s) = shift·s / (1 + (shift - 1)·s): spends more of the steps at high noise."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def timesteps(steps: int | Sequence[float]) -> tuple[float, ...]:
    """The unshifted timesteps of so many steps, evenly spaced from noise to data; a list of them as it is.

    Raises:
        ConfigError: fewer than 1 step or more than 1000.
    """
    if not isinstance(steps, int):
        return tuple(steps)
    if not 1 <= steps <= 1000:
        raise ConfigError(f"steps must be at least 1 and at most 1000, not {steps}")
    return tuple(1000 * (steps - i) / steps for i in range(steps))


def sigmas(config: SamplerConfig) -> list[float]:
    """The noise level of every step, shifted, falling, without the final 0."""
    return [shift_sigma(step / 1000, config.shift) for step in config.steps]


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
