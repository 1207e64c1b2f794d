"""Classifier-free guidance of a whole video: both branches in one batch, or at once on the mesh's `cfg` axis.

Shapes: B batch, f frames on this rank, S tokens of a frame, E numbers in a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

from causalrope_sp.diffusion.schedule import guide
from causalrope_sp.distributed import SequenceParallel
from causalrope_sp.errors import ConfigError

T = TypeVar("T")


class Guidance:
    """Which branches this rank computes, and how they become one prediction.

    Args:
        scale: the guidance scale; 1 has no unconditional branch.
        parallel: the ranks and their mesh.

    Raises:
        ConfigError: the `cfg` axis has two ranks, but the scale is 1.
    """

    def __init__(self, scale: float, parallel: SequenceParallel) -> None:
        if parallel.mesh.cfg > 1 and scale == 1:
            raise ConfigError(
                f"cfg of the mesh must be 1 without guidance (a guidance scale of 1), not {parallel.mesh.cfg}"
            )
        self._scale, self._parallel = scale, parallel

    def own(self, conditional: Sequence[T], unconditional: Sequence[T]) -> list[T]:
        """Returns the batch entries that this rank computes."""
        if self._scale == 1:
            return list(conditional)
        if self._parallel.mesh.cfg == 1:
            return [*conditional, *unconditional]
        return list((conditional, unconditional)[self._parallel.cfg_rank])

    def inputs(self, tokens_BfSE: Tensor) -> Tensor:
        """Returns the tokens once for every branch of this rank."""
        both = self._scale != 1 and self._parallel.mesh.cfg == 1
        return torch.cat([tokens_BfSE, tokens_BfSE]) if both else tokens_BfSE

    def combine(self, predicted: Tensor) -> Tensor:
        """Returns the guided prediction, (B, f, S, E), of what the branches of this rank predicted."""
        if self._scale == 1:
            return predicted
        if self._parallel.mesh.cfg == 1:
            conditional, unconditional = predicted.chunk(2)
        else:
            conditional, unconditional = self._parallel.all_gather_cfg("guidance", predicted)
        return guide(conditional, unconditional, self._scale)
