"""Which attention strategy a stream uses."""

from __future__ import annotations

from causalrope_sp.distributed import SequenceParallel
from causalrope_sp.distributed.layout import AUTO, Layout, parse_strategy
from causalrope_sp.planning.cost import plan
from causalrope_sp.planning.machines import Machine
from causalrope_sp.planning.memory import NO_AUXILIARY, AuxiliaryMemory
from causalrope_sp.planning.workload import Workload


def choose_strategy(
    workload: Workload, machine: Machine, group: SequenceParallel, auxiliary: AuxiliaryMemory = NO_AUXILIARY
) -> Layout:
    """The layout of the strategy that was asked for or, for "auto", of the one that is predicted to be the fastest of
    those that fit into memory. The answer is the same on every rank that asks with the same sizes.

    Args:
        workload: the stream.
        machine: the rates that are predicted with, the same on every rank.
        group: the ranks, and the strategy that was asked for.
        auxiliary: what stands beside the DiT in a rank's memory.

    Raises:
        ConfigError: more ranks than tokens in a frame, or fewer heads than ranks that trade tokens for heads.
    """
    group.check(workload.grid, workload.config.num_heads)
    mesh, name = group.mesh, group.strategy
    if name == AUTO:
        costs = plan(workload, mesh.cfg * mesh.sp, machine, cfg_sizes=[mesh.cfg], auxiliary=auxiliary)
        name = next(cost.strategy for cost in costs if cost.chosen)
    return parse_strategy(name, mesh.sp)
