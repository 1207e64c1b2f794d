"""Sequence parallelism: one stream on many ranks."""

from causalrope_sp.parallel.group import STRATEGIES, SequenceParallel

__all__ = ["STRATEGIES", "SequenceParallel"]
