"""The communicators of a rank, each made once, and the process groups behind them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import timedelta

import torch.distributed as dist

from causalrope_sp.distributed.comm_stats import CommStats
from causalrope_sp.distributed.communicator import Communicator
from causalrope_sp.distributed.subgroup import subgroup


class Communicators:
    """Makes communicators of ranks of one group, and ends them.

    Args:
        group: the process group of all ranks; None for one process, which has no collectives.
        comm_stats: counts every collective.
        timeout: the timeout of the process groups that are made within `group`.
        lost_rank: called when a collective fails; returns a line that names the lost rank, or None.

    Attributes:
        made: the communicators, by backend (None for that of `group`) and ranks.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        comm_stats: CommStats,
        timeout: timedelta,
        lost_rank: Callable[[], str | None],
    ) -> None:
        self._group, self._comm_stats, self._timeout, self._lost_rank = group, comm_stats, timeout, lost_rank
        self.made: dict[tuple[str | None, tuple[int, ...]], Communicator] = {}

    def among(self, ranks: Sequence[int], backend: str | None = None) -> Communicator:
        """Returns the communicator of some ranks, this one included; all of them must call it. `backend` None is the
        backend of the whole group."""
        key = backend, tuple(ranks)
        if key not in self.made:
            assert self._group is not None, "one process has no collectives, and a closed group none any more"
            group = self._group
            if len(ranks) < group.size() or backend is not None:
                group = subgroup(self._group, ranks, backend, self._timeout)
            self.made[key] = Communicator(group, self._comm_stats, self._lost_rank)
        return self.made[key]

    def end(self, within_s: float = 0.0) -> None:
        """Destroys the gloo groups that have no collective in flight, so that their threads end before Python does.

        Such a thread lets go of a collective's tensors some time after the collective is over. One that does so while
        Python ends aborts the process (pytorch issue 190489). A group with a collective in flight stays, since its end
        could take as long as its timeout; NCCL groups stay too.

        Args:
            within_s: how many seconds to wait for collectives in flight.
        """
        deadline = time.monotonic() + within_s
        while any(communicator.busy for communicator in self.made.values()) and time.monotonic() < deadline:
            time.sleep(0.01)
        self._group = None
        for _, communicator in sorted(
            self.made.items(), key=lambda item: len(item[0][1])
        ):  # the group of all ends last
            communicator.end()
