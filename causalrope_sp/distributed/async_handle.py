"""A collective that was started, to wait for."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from causalrope_sp.distributed.comm_stats import Entry

if TYPE_CHECKING:
    from causalrope_sp.distributed.communicator import Communicator


class AsyncHandle:
    """A collective that was started. After `wait` the send buffer may be written and the pieces may be read."""

    def __init__(
        self, work: dist.Work, pieces: list[Tensor], communicator: Communicator, kind: str, layer: int
    ) -> None:
        self._work, self._pieces, self._communicator = work, pieces, communicator
        self._kind, self._layer = kind, layer

    def wait(self) -> list[Tensor]:
        """Waits for the collective. On CUDA the stream waits and the host does not.

        Returns:
            The pieces that this rank received, in order of rank.

        Raises:
            RankLostError: the collective failed; the message names the lost rank if the watchdog knows it.
        """
        comm_stats, kind, layer = self._communicator.comm_stats, self._kind, self._layer
        if comm_stats.captured is not None:
            self._finish()
        elif self._pieces[0].is_cuda:
            began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            began.record()
            self._finish()
            ended.record()
            comm_stats.add_wait(kind, layer, began, ended)
        else:
            started = time.perf_counter()
            self._finish()
            comm_stats.add(kind, layer, Entry(waited_s=time.perf_counter() - started))
        return self._pieces

    def _finish(self) -> None:
        """Waits, and raises RankLostError for a collective that failed."""
        try:
            self._work.wait()
        except RuntimeError as error:
            self._communicator.in_flight.discard(self._work)
            if self._communicator.comm_stats.captured is not None:  # nothing is sent, so no rank is lost
                raise
            raise self._communicator.lost(self._kind, error) from error
        self._communicator.in_flight.discard(self._work)
