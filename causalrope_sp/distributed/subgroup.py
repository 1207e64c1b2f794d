"""A process group of some ranks of another process group, made by these ranks alone."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import PrefixStore, Store, distributed_c10d  # type: ignore[attr-defined]

from causalrope_sp.errors import RankLostError


def subgroup(
    group: dist.ProcessGroup, ranks: Sequence[int], backend: str | None, timeout: timedelta
) -> dist.ProcessGroup:
    """Makes a process group of some ranks of `group`, this one included. All of them must call this, and must make
    their groups of the same ranks in the same order, from one thread.

    `dist.new_group(use_local_synchronization=True)` names a new group by its ranks and by the number of groups that a
    process has. Ranks with different numbers, for example since one of them only decodes, wait for one another in vain
    (pytorch issue 173608), and a number that comes again is refused. Here the name is the ranks and how often they have
    made a group of the same ranks. For that it calls a private function of torch, as it is in 2.11 to 2.13.

    Args:
        group: the process group that knows all ranks.
        ranks: the ranks of the new group, as `group` numbers them, in the order of their new numbers.
        backend: the new group's backend, or None for that of `group`.
        timeout: the new group's timeout, and how long its ranks wait for one another.

    Raises:
        RankLostError: a rank did not come within the timeout.
    """
    every, own, store = dist.get_process_group_ranks(group), group.rank(), group.get_group_store()
    members = [every[rank] for rank in ranks]
    name = "subgroup/" + "_".join(str(member) for member in members)
    call = store.add(f"{name}/calls/{own}", 1)
    keys = {rank: f"{name}/{call}/{rank}" for rank in ranks}
    try:
        store.set(keys[own], "")
        _meet(store, keys, timeout)
        made, _ = distributed_c10d._new_process_group_helper(
            len(members),
            list(ranks).index(own),
            members,
            dist.Backend(backend or dist.get_backend(group)),
            PrefixStore(name, store),
            f"{name}/{call}",  # type: ignore[arg-type]  # a str of a type that not every version has
            timeout=timeout,
        )
    except BaseException:  # a later call of this rank can still meet the others
        with suppress(RuntimeError):  # the store may have gone
            store.delete_key(keys[own])
            store.add(f"{name}/calls/{own}", -1)
        raise
    assert isinstance(made, dist.ProcessGroup)
    distributed_c10d._world.pg_group_ranks[made] = {member: rank for rank, member in enumerate(members)}
    return made


def _meet(store: Store, keys: dict[int, str], timeout: timedelta) -> None:
    try:
        store.wait(list(keys.values()), timeout)
    except RuntimeError as error:
        late = ", ".join(str(rank) for rank, key in keys.items() if not store.check([key]))
        ranks = ", ".join(str(rank) for rank in keys)
        raise RankLostError(
            f"rank {late} did not come within {timeout.total_seconds():g} s to make the group of ranks {ranks}"
        ) from error
