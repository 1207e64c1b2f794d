"""Sequence parallelism: one stream on many ranks."""

from causalrope_sp.parallel.group import SequenceParallel
from causalrope_sp.parallel.layout import STRATEGIES, strategies

__all__ = ["STRATEGIES", "SequenceParallel", "strategies"]
