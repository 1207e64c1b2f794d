"""How a process joins the ranks that a launcher has started, is watched among them, and leaves them again."""

from __future__ import annotations

import atexit
import os
import sys
import time
from collections.abc import Callable, Collection
from datetime import timedelta
from types import TracebackType

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from causalrope_sp.distributed.comm_stats import CommStats
from causalrope_sp.distributed.loading_watch import LoadingWatch
from causalrope_sp.distributed.notices import NoticeBoard, raised
from causalrope_sp.distributed.termination import name_lost_rank_on_sigterm
from causalrope_sp.distributed.turns import Turns
from causalrope_sp.distributed.watchdog import Watchdog, leave
from causalrope_sp.errors import RankLostError, first_line
from causalrope_sp.siblings import Siblings, end_with_launcher

REST_S = 0.2  # seconds

_servers: dict[int, TCPStore] = {}  # by port: a process keeps its store, since another rank may join anew at once


class Membership:
    """This process among the ranks of torchrun's environment. Its construction waits for all of them.

    Args:
        device: where this rank computes, which decides the backend.
        timeout_s, silence_s, on_loss, siblings: see `SequenceParallel.from_env`.

    Attributes:
        group: the process group of all ranks.
        timeout: the timeout of its collectives, so long that the watchdog is first and names the rank.
        board: the notices of all ranks.

    Raises:
        RankLostError: not all ranks have come in time.
    """

    def __init__(
        self,
        device: torch.device,
        timeout_s: float,
        silence_s: float,
        on_loss: Callable[[str], None],
        siblings: Siblings,
    ) -> None:
        self._silence_s, self._timeout_s, self._on_loss, self._siblings = silence_s, timeout_s, on_loss, siblings
        self.timeout = timedelta(seconds=timeout_s + 2 * silence_s)
        self._watchdog: Watchdog | None = None
        self._rank, self._size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        end_with_launcher()
        atexit.unregister(_rest)
        atexit.register(_rest)  # after the watchdog has stopped, which registers later
        if on_loss is leave:
            name_lost_rank_on_sigterm(siblings)
        self._loading = LoadingWatch(siblings, on_loss)
        try:
            self._join("nccl" if device.type == "cuda" else "gloo")
        except RuntimeError as error:
            raise RankLostError(f"the {self._size} ranks have not met: {first_line(error)}") from error

    def _join(self, backend: str) -> None:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        of_launcher = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        if self._rank == 0 and not of_launcher:
            _servers[port] = TCPStore(
                address, port, None, True, timeout=self.timeout, multi_tenant=True, wait_for_workers=False
            )
        # a connection of its own for notices, since a blocking call on a connection blocks every other call on it
        patience = self.timeout, timedelta(seconds=self._silence_s)
        meeting, telling = (TCPStore(address, port, None, False, timeout=limit) for limit in patience)
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        number = meeting.add(f"causalrope/{attempt}/{self._rank}", 1)  # how many groups this rank has made
        prefix = f"causalrope/{attempt}/{number}"
        dist.init_process_group(
            backend,
            store=PrefixStore(f"{prefix}/meeting", meeting),
            timeout=self.timeout,
            rank=self._rank,
            world_size=self._size,
        )
        self._holds_store = port in _servers
        holder = "the launcher of rank 0" if of_launcher else "rank 0"
        self.board = NoticeBoard(PrefixStore(f"{prefix}/notices", telling), self._rank, self._size, holder)

    @property
    def group(self) -> dist.ProcessGroup:
        """The process group of all ranks."""
        assert dist.group.WORLD is not None, "it is made at construction and lives until `close`"
        return dist.group.WORLD

    def watch(self, comm_stats: CommStats, peers: Collection[int], turns: Turns) -> None:
        """Starts the watchdog of this rank, and tells the other ranks if an error ends the program.

        Args:
            comm_stats: counts the collectives of this rank.
            peers: the ranks that make the same collectives as this one.
            turns: the turns of this rank.
        """
        self._comm_stats = comm_stats
        self._watchdog = Watchdog(
            self.board,
            self._rank,
            lambda: comm_stats.begun,
            peers,
            self._on_loss,
            self._silence_s,
            self._timeout_s,
            turns.hopeless,
            self._siblings,
            self._holds_store,
        )
        self._loading.stop()
        self._siblings.last_words = self.board.last_words
        self._hook, self._other_hook = self._tell_error, sys.excepthook
        sys.excepthook = self._hook

    def cause(self) -> str | None:
        """Returns a line that names the rank because of which a collective has failed, or None."""
        return None if self._watchdog is None else self._watchdog.cause()

    def fail(self, error: BaseException) -> None:
        """Tells the other ranks what ends this program."""
        self.board.end(raised(error), self._comm_stats.started)

    def _tell_error(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        """Tells the other ranks what ends this program, and then does what was done before."""
        self.fail(error)
        self._other_hook(kind, error, trace)

    def close(self) -> None:
        """Stops the watchdog and destroys the process group."""
        if self._watchdog is not None:
            self._watchdog.stop()
            if sys.excepthook is self._hook:
                sys.excepthook = self._other_hook
        if dist.is_initialized():
            dist.destroy_process_group()


def _rest() -> None:
    """Waits until the threads of gloo have let go of the last collectives' tensors, some time after these are over.

    A thread that does so while Python ends aborts the process (pytorch issue 190489). To destroy the groups would end
    the threads for certain, but wait for every collective in flight, also in groups that the program has made itself.
    """
    time.sleep(REST_S)
