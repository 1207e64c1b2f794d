"""The update of a chunk's latents from one noise level to the next, by the name of its solver.

An update is elementwise, so that it runs on a rank's shard. That of "unipc" has a history, and begins anew with each
chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from causalrope_sp.config import SamplerConfig
from causalrope_sp.diffusion.schedule import SOLVERS, sigmas
from causalrope_sp.errors import ConfigError

Solve = Callable[[Tensor, Tensor, float, float, Callable[[], Tensor]], Tensor]
"""(x, velocity, σ of x, σ to reach, fresh noise) to x at that level."""


def start_solver(config: SamplerConfig, begin: int = 0) -> Solve:
    """The update for one chunk, from step `begin` on.

    Raises:
        ConfigError: diffusers, which has UniPC, is not installed.
    """
    return UniPC(sigmas(config), begin).step if config.solver == "unipc" else SOLVERS[config.solver]


class UniPC:
    """diffusers' UniPC of order 2 for flow matching, through all of `levels` and then 0, in the latents' own dtype.

    diffusers keeps noise levels in float32, and with them the coefficients, of which some are differences of nearly
    equal numbers. They are put there in float64 instead.
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
        """The steps must come in order; draws no noise."""
        made: Tensor = self._scheduler.step(velocity, 1000 * sigma, x, return_dict=False)[0]
        return made
