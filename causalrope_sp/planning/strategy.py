"""Chooses the attention strategy of a stream."""

from __future__ import annotations

import json
from dataclasses import asdict

from causalrope_sp.distributed import SequenceParallel
from causalrope_sp.distributed.layout import AUTO, Layout, parse_strategy
from causalrope_sp.planning.cost import plan
from causalrope_sp.planning.machines import Machine, default_machine
from causalrope_sp.planning.memory import NO_AUXILIARY, AuxiliaryMemory
from causalrope_sp.planning.workload import Workload


def choose_strategy(
    workload: Workload, machine: Machine, group: SequenceParallel, auxiliary: AuxiliaryMemory = NO_AUXILIARY
) -> Layout:
    """Chooses the layout of a stream's attention.

    Args:
        workload: the stream.
        machine: the rates of a rank, the same on every rank.
        group: the ranks, and the name of the strategy or "auto".
        auxiliary: the memory of a rank in addition to the DiT and its cache.

    Returns:
        The layout of the named strategy. For "auto" it is that of the strategy which is predicted to be the fastest of
        those that fit into memory; ranks that pass the same arguments get the same layout.

    Raises:
        ConfigError: there are more ranks than tokens in a frame, or fewer heads than `ulysses` ranks.
    """
    group.check(workload.grid, workload.config.num_heads)
    mesh, name = group.mesh, group.strategy
    if name == AUTO:
        costs = plan(workload, mesh.cfg * mesh.sp, machine, cfg_sizes=[mesh.cfg], auxiliary=auxiliary)
        name = next(cost.strategy for cost in costs if cost.chosen)
    return parse_strategy(name, mesh.sp)


def layout_of_stream(workload: Workload, group: SequenceParallel, given: Layout | None) -> Layout:
    """Returns the layout that a stream was given, or the one that all ranks choose. Every rank that denoises must call
    this, also one that is given a layout.

    Args:
        workload: the stream.
        group: the ranks, and the name of the strategy or "auto".
        given: a layout that was chosen before, or None.

    Raises:
        ConfigError: as `choose_strategy`.
        RankLostError: the collective failed.
    """
    machine = common_machine(group)
    return given or choose_strategy(workload, machine, group)


def common_machine(group: SequenceParallel, everyone: bool = False) -> Machine:
    """Returns the machine that ranks plan with: that of the first one, since GPUs may differ. Every one of them must
    call this.

    Args:
        group: the ranks.
        everyone: whether all ranks call it, also those that only decode.

    Raises:
        RankLostError: the collective failed.
    """
    own = default_machine(group.device)
    if group.device.type == "cpu":
        return own
    ranks = group.everyone if everyone else group.denoisers
    return Machine(**json.loads(ranks.first_says(json.dumps(asdict(own)))))
