"""A process group of some ranks of another, made by these ranks alone."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import distributed_c10d


def subgroup(
    group: dist.ProcessGroup, ranks: Sequence[int], backend: str | None, timeout: timedelta
) -> dist.ProcessGroup:
    """Makes a process group of some ranks of `group`, this one included. All of them must call this.

    torch finds the other ranks of a new group by a name made of the ranks and of the number of groups that each of them
    has. Ranks that have different numbers, for example since one of them only decodes, would wait for one another in
    vain. So every rank first makes groups of itself alone, until it has as many as the rank with the most.

    Args:
        group: the process group that knows all ranks.
        ranks: the ranks of the new group, as `group` numbers them.
        backend: the new group's backend, or None for that of the whole program.
        timeout: the new group's timeout.
    """
    every, own, store = dist.get_process_group_ranks(group), group.rank(), group.get_group_store()
    name = "_".join(str(rank) for rank in ranks)
    time = store.add(f"subgroups/{name}/{own}", 1)  # how often this rank has made such a group
    keys = {rank: f"subgroups/{name}/{time}/{rank}" for rank in ranks}
    store.set(keys[own], str(_groups()))
    store.wait(list(keys.values()), timeout)
    for _ in range(max(int(store.get(key)) for key in keys.values()) - _groups()):
        dist.new_group([every[own]], timeout, "gloo", use_local_synchronization=True)
    made = dist.new_group([every[rank] for rank in ranks], timeout, backend, use_local_synchronization=True)
    assert isinstance(made, dist.ProcessGroup)
    return made


def _groups() -> int:
    """Returns the number of process groups that this process has, as torch counts them for a name."""
    return len(distributed_c10d._world.pg_names)
