"""Starts ranks as processes of this machine, for `verify`, tests and benchmarks. Users start torchrun."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FileStore
from torch.multiprocessing.spawn import spawn


def run_ranks(work: Callable[..., Any], ranks: int, *args: Any, device: str = "cpu") -> Any:
    """Calls work(group, device, *args) on every rank of a new group and returns what rank 0 returned.

    `work` must be importable by name. One rank runs in this process, with group None.

    Raises:
        torch.multiprocessing.ProcessRaisedException: a rank raised; the others are ended.
    """
    if ranks == 1:
        return work(None, device, *args)
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.pt"
        spawn(_rank, (ranks, device, folder, result, work, args), nprocs=ranks)
        return torch.load(result, weights_only=False)


def _rank(rank: int, ranks: int, device: str, folder: str, result: Path, work: Callable[..., Any], args: Any) -> None:
    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(rank)
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, store=FileStore(f"{folder}/store", ranks), rank=rank, world_size=ranks)
    value = work(dist.group.WORLD, device, *args)
    if rank == 0:
        torch.save(value, result)
    dist.barrier()
    dist.destroy_process_group()
