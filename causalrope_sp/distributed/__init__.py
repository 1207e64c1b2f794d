"""Sequence parallelism: one stream on many ranks."""

from causalrope_sp.distributed.group import SequenceParallel
from causalrope_sp.distributed.layout import STRATEGIES, strategies

__all__ = ["STRATEGIES", "SequenceParallel", "strategies"]
