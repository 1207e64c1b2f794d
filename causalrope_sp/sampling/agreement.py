"""What all ranks settle before a stream: one strategy, and all else that their collectives depend on."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from causalrope_sp.attention.base import Strategy
from causalrope_sp.attention.build import build_strategy, describe_strategy
from causalrope_sp.distributed import SequenceParallel
from causalrope_sp.distributed.layout import Layout
from causalrope_sp.planning.workload import Workload


def digest(x: Tensor) -> str:
    """Returns a short text that differs for tensors that differ in dtype, shape or any bit."""
    data = x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return hashlib.blake2b(f"{x.dtype} {tuple(x.shape)}".encode() + data.tobytes(), digest_size=8).hexdigest()


def agree_on_strategy(
    parallel: SequenceParallel, work: Workload, layout: Layout, agreed: Mapping[str, object]
) -> Strategy:
    """Returns this rank's strategy, after all ranks that denoise have agreed on it. Every one of them must call it.

    Args:
        parallel: the ranks.
        work: the stream, in sizes.
        layout: how the ranks share attention.
        agreed: what else must be the same on all ranks, by name.

    Raises:
        ConfigError: ranks that differ, or that the strategy cannot use.
    """
    parallel.denoisers.agree({"strategy": describe_strategy(parallel, layout), **agreed})
    return build_strategy(parallel, layout, work.grid, work.head_rings(layout.ulysses))
