"""Solvers: the update of a chunk's latents from one noise level to the next.

An update is elementwise, so that it runs on a rank's shard. "unipc" keeps a history, which begins anew with each chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from causalrope_sp.config import SamplerConfig
from causalrope_sp.diffusion.schedule import SOLVERS, sigmas
from causalrope_sp.errors import ConfigError

Solve = Callable[[Tensor, Tensor, float, float, Callable[[], Tensor]], Tensor]
"""Takes (x, velocity, σ of x, σ to reach, a function that draws fresh noise) and returns x at the σ to reach."""


def start_solver(config: SamplerConfig, begin: int = 0) -> Solve:
    """Returns the update for one chunk.

    Args:
        config: the sampler.
        begin: the number of the first step to run, counted from 0.

    Raises:
        ConfigError: the solver is "unipc" and diffusers, which implements it, is not installed.
    """
    return UniPC(sigmas(config), begin).step if config.solver == "unipc" else SOLVERS[config.solver]


class UniPC:
    """diffusers' UniPC of order 2 (arXiv 2302.04867) for flow matching, in the latents' own dtype.

    diffusers keeps noise levels in float32 and computes its coefficients from them, some of which are differences of
    nearly equal numbers. This class sets the noise levels in float64 instead, and those of the sampler's timestep rule
    in place of diffusers' own.

    Args:
        levels: noise levels of all steps, falling; a final 0 is appended.
        begin: the number of the first step to run, counted from 0.

    Raises:
        ConfigError: diffusers is not installed.
    """

    def __init__(self, levels: Sequence[float], begin: int) -> None:
        try:
            from diffusers import UniPCMultistepScheduler
        except ImportError:
            raise ConfigError("solver unipc needs diffusers, which is not installed: pip install diffusers") from None
        self._scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
        self._scheduler.set_timesteps(len(levels))
        self._scheduler.sigmas = torch.tensor([*levels, 0.0], dtype=torch.float64)
        self._scheduler.set_begin_index(begin)

    def step(self, x: Tensor, velocity: Tensor, sigma: float, to: float, fresh: Callable[[], Tensor]) -> Tensor:
        """Updates the latents, see `Solve`. Steps must be taken in order; draws no noise."""
        updated: Tensor = self._scheduler.step(velocity, 1000 * sigma, x, return_dict=False)[0]
        return updated
