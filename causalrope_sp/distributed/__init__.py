"""Sequence parallelism: the ranks of one stream, their groups and their collectives."""

from causalrope_sp.distributed.group import SequenceParallel
from causalrope_sp.distributed.layout import STRATEGIES, strategies

__all__ = ["STRATEGIES", "SequenceParallel", "strategies"]
