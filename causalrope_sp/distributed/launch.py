"""Starts ranks as processes of this machine, for `verify`, tests and benchmarks. Users run torchrun."""

from __future__ import annotations

import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import multiprocessing
from torch.distributed import FileStore  # type: ignore[attr-defined]

from causalrope_sp.errors import RankLostError


class RankPool:
    """A pool of processes that run as ranks.

    The processes are started once, since a start takes seconds and a new process group hardly any time. More processes
    are started when more ranks are needed. Use the pool in a `with` block, or call `close`.

    Args:
        device: the kind of device that the ranks compute on, "cpu" or "cuda".
    """

    def __init__(self, device: str = "cpu") -> None:
        self._device = device
        self._folder = tempfile.TemporaryDirectory()
        self._workers: list[tuple[Any, Connection]] = []
        self._runs = 0

    def run(self, work: Callable[..., Any], ranks: int, *args: Any) -> Any:
        """Calls a function on every rank of a new process group.

        Args:
            work: called as work(group, device, *args); it must be importable by name.
            ranks: how many ranks run it. A single rank runs in this process, with group None.
            args: further arguments of `work`.

        Returns:
            What `work` returned on rank 0.

        Raises:
            RankLostError: a rank raised or ended; the message holds its traceback. All processes are ended.
        """
        if ranks == 1:
            return work(None, self._device, *args)
        self._start(ranks)
        self._runs += 1
        store = str(Path(self._folder.name) / f"store{self._runs}")
        for rank, (_, pipe) in enumerate(self._workers[:ranks]):
            pipe.send((rank, ranks, self._device, store, work, args))
        results: dict[int, Any] = {}
        pending = {pipe: rank for rank, (_, pipe) in enumerate(self._workers[:ranks])}
        while pending:
            for ready in wait(list(pending)):
                assert isinstance(ready, Connection)
                rank = pending.pop(ready)
                try:
                    failed, results[rank] = ready.recv()
                except EOFError:
                    failed, results[rank] = True, "it ended"
                if failed:
                    rank, why = self._first_to_end(ranks) or (rank, results[rank])
                    self._end()
                    raise RankLostError(f"rank {rank} of {ranks} failed: {why}")
        return results[0]

    def close(self) -> None:
        """Ends all processes."""
        self._end()
        self._folder.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self, count: int) -> None:
        """Starts processes until there are `count`."""
        context = multiprocessing.get_context("spawn")
        for _ in range(count - len(self._workers)):
            own_end, worker_end = context.Pipe()
            process = context.Process(target=_serve, args=(worker_end,), daemon=True)
            process.start()
            worker_end.close()
            self._workers.append((process, own_end))

    def _first_to_end(self, ranks: int) -> tuple[int, str] | None:
        """The first rank whose process has ended, with the reason: it is the cause of what the others raise."""
        ended = wait([process.sentinel for process, _ in self._workers[:ranks]], timeout=1)
        for rank, (process, _) in enumerate(self._workers[:ranks]):
            if process.sentinel in ended:
                process.join()
                return rank, f"it ended with status {process.exitcode}"
        return None

    def _end(self) -> None:
        """Kills all processes and waits for their end."""
        for process, pipe in self._workers:
            pipe.close()
            process.kill()
        for process, _ in self._workers:
            process.join()
        self._workers.clear()


def run_ranks(work: Callable[..., Any], ranks: int, *args: Any, device: str = "cpu") -> Any:
    """Calls a function on every rank of a new process group, in a pool of its own; see `RankPool.run`.

    Args:
        work: called as work(group, device, *args); it must be importable by name.
        ranks: how many ranks run it.
        args: further arguments of `work`.
        device: the kind of device that the ranks compute on, "cpu" or "cuda".

    Returns:
        What `work` returned on rank 0.

    Raises:
        RankLostError: a rank raised or ended.
    """
    with RankPool(device) as pool:
        return pool.run(work, ranks, *args)


def _serve(pipe: Connection) -> None:
    """Runs the work that a process receives until its pipe is closed."""
    torch.set_num_threads(1)
    while True:
        try:
            rank, ranks, device, store, work, args = pipe.recv()
        except EOFError:
            return
        try:
            result = False, _as_rank(rank, ranks, device, store, work, args)
        except Exception:
            result = True, traceback.format_exc()
        pipe.send(result)


def _as_rank(rank: int, ranks: int, device: str, store: str, work: Callable[..., Any], args: Any) -> Any:
    """Calls `work` within a new process group; returns its result on rank 0 and None on the others."""
    if device == "cuda":
        torch.cuda.set_device(rank)
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, store=FileStore(store, ranks), rank=rank, world_size=ranks)
    value = work(dist.group.WORLD, device, *args)
    dist.barrier()
    dist.destroy_process_group()
    return value if rank == 0 else None
