"""Sums of measurements over ranks."""

from __future__ import annotations

import json

import torch
from torch import Tensor

from causalrope_sp.distributed import SequenceParallel


def sum_of_ranks(own: Tensor, parallel: SequenceParallel) -> Tensor:
    """Returns the sum of a tensor over the ranks of the `sp` axis, all of which must call it.

    Args:
        own: this rank's numbers, in float64 on the host.
        parallel: the ranks.
    """
    if parallel.mesh.sp == 1:
        return own
    gathered = parallel.sp_communicator().everyone({"numbers": json.dumps(own.tolist())})
    return torch.tensor([json.loads(fields["numbers"]) for fields in gathered], dtype=own.dtype).sum(0)
