"""Starts ranks as processes of this machine, for `verify`, tests and benchmarks. Users start torchrun."""

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
    """Processes that wait for work, so that they are started once: a start costs seconds, a new group hardly anything.

    Use it in a `with` block, or `close` it. More processes are started as more ranks are asked for.
    """

    def __init__(self, device: str = "cpu") -> None:
        self._device = device
        self._folder = tempfile.TemporaryDirectory()
        self._workers: list[tuple[Any, Connection]] = []
        self._runs = 0

    def run(self, work: Callable[..., Any], ranks: int, *args: Any) -> Any:
        """Calls work(group, device, *args) on every rank of a new group and returns what rank 0 returned.

        `work` must be importable by name. One rank runs in this process, with group None.

        Raises:
            RankLostError: a rank raised, or ended; its traceback is in the message, and all processes are ended.
        """
        if ranks == 1:
            return work(None, self._device, *args)
        self._start(ranks)
        self._runs += 1
        store = str(Path(self._folder.name) / f"store{self._runs}")
        for rank, (_, pipe) in enumerate(self._workers[:ranks]):
            pipe.send((rank, ranks, self._device, store, work, args))
        results: dict[int, Any] = {}
        waiting = {pipe: rank for rank, (_, pipe) in enumerate(self._workers[:ranks])}
        while waiting:
            for ready in wait(list(waiting)):
                assert isinstance(ready, Connection)
                rank = waiting.pop(ready)
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
        self._end()
        self._folder.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self, count: int) -> None:
        context = multiprocessing.get_context("spawn")
        for _ in range(count - len(self._workers)):
            mine, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self._workers.append((process, mine))

    def _first_to_end(self, ranks: int) -> tuple[int, str] | None:
        """A process that is gone is the cause; what the others then raise is not."""
        ended = wait([process.sentinel for process, _ in self._workers[:ranks]], timeout=1)
        for rank, (process, _) in enumerate(self._workers[:ranks]):
            if process.sentinel in ended:
                process.join()
                return rank, f"it ended with status {process.exitcode}"
        return None

    def _end(self) -> None:
        for process, pipe in self._workers:
            pipe.close()
            process.kill()
        for process, _ in self._workers:
            process.join()
        self._workers.clear()


def run_ranks(work: Callable[..., Any], ranks: int, *args: Any, device: str = "cpu") -> Any:
    """`RankPool.run` in a pool of its own."""
    with RankPool(device) as pool:
        return pool.run(work, ranks, *args)


def _serve(pipe: Connection) -> None:
    torch.set_num_threads(1)
    while True:
        try:
            rank, ranks, device, store, work, args = pipe.recv()
        except EOFError:
            return
        try:
            answer = False, _as_rank(rank, ranks, device, store, work, args)
        except Exception:
            answer = True, traceback.format_exc()
        pipe.send(answer)


def _as_rank(rank: int, ranks: int, device: str, store: str, work: Callable[..., Any], args: Any) -> Any:
    if device == "cuda":
        torch.cuda.set_device(rank)
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, store=FileStore(store, ranks), rank=rank, world_size=ranks)
    value = work(dist.group.WORLD, device, *args)
    dist.barrier()
    dist.destroy_process_group()
    return value if rank == 0 else None
