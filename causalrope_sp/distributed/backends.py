"""What a process group must have for the device that its ranks compute on: the backend, and a GPU for every rank."""

from __future__ import annotations

import time
from contextlib import suppress
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore  # type: ignore[attr-defined]

from causalrope_sp.distributed.notices import NoticeBoard
from causalrope_sp.distributed.turns import Pause
from causalrope_sp.errors import ConfigError, RankLostError

ADVICE = {
    "cuda": "init_process_group('nccl') or init_process_group('cpu:gloo,cuda:nccl')",
    "cpu": "init_process_group('gloo'), or give the rank's GPU as device",
}


def check_backend(group: dist.ProcessGroup, device: torch.device) -> None:
    """Checks that a process group has a backend for tensors on a device.

    gloo takes tensors of GPUs, but torch documents it for some collectives alone; others give wrong numbers, and a CUDA
    graph cannot hold any.

    Args:
        group: the process group.
        device: where this rank computes.

    Raises:
        ConfigError: the group has no backend for the device, or gloo for a GPU.
    """
    backends = dict(pair.split(":") for pair in dist.get_backend_config(group).split(","))
    found = backends.get(device.type)
    if found is None or (device.type == "cuda" and found == "gloo"):
        expected = "NCCL for ranks on GPUs" if device.type == "cuda" else "gloo for ranks on CPUs"
        others = " and ".join(f"{backend} for {kind}" for kind, backend in backends.items())
        got = found or f"a group without a backend for {device.type} ({others})"
        raise ConfigError(f"group: expected {expected}, got {got}: call {ADVICE[device.type]}")


def check_own_gpu(group: dist.ProcessGroup, device: torch.device, timeout: timedelta) -> None:
    """Checks that every rank has a GPU of its own. All ranks on GPUs must call this, and it waits for all of them, so
    that none goes on to a collective that another one has been refused. Where a rank has not come in time, the others
    may try again; if it came to some of them meanwhile, they disagree on how often they have met and wait in vain.

    Args:
        group: the process group, whose NCCL would fail at the first collective.
        device: where this rank computes.
        timeout: how long the ranks wait for one another.

    Raises:
        ConfigError: two ranks compute on one GPU; every rank raises the same.
        RankLostError: a rank did not come within the timeout, or the store has gone.
    """
    if device.type != "cuda":
        return
    store, own = group.get_group_store(), group.rank()
    counter = f"causalrope/gpu/{own}"
    try:
        number = store.add(counter, 1)  # how often this rank has come here: GPUs of another time may be others
    except RuntimeError as error:
        raise RankLostError(f"the process group's store has gone: {error}") from error
    board = NoticeBoard(PrefixStore(f"causalrope/gpus/{number}", store), own, group.size())
    keys = [str(rank) for rank in range(group.size())]
    try:
        board.put(keys[own], f"{gpu_uuid(device)} {device}")
        _meet(board, keys, timeout)
    except BaseException:  # a later call of this rank can still meet the others, which may find its key meanwhile
        with suppress(RuntimeError):  # the store may have gone
            store.add(counter, -1)
        raise
    ranks: dict[str, list[int]] = {}
    names: list[str] = []
    for rank, text in enumerate(board.texts(keys)):
        uuid, name = text.rsplit(" ", 1)
        ranks.setdefault(uuid, []).append(rank)
        names.append(name)
    for first, *others in ranks.values():
        if others:
            *some, last = others
            listed = ", ".join(map(str, [first, *some]))
            raise ConfigError(
                f"ranks {listed} and {last} compute on one GPU, {names[first]} of rank {first}: give every rank of a "
                "machine its own, such as device=f'cuda:{LOCAL_RANK}'"
            )


def _meet(board: NoticeBoard, keys: list[str], timeout: timedelta) -> None:
    """Waits until every rank has set its key, in short requests, between which an interrupt is noticed."""
    pause, latest = Pause(), time.monotonic() + timeout.total_seconds()
    while not board.has(keys):
        if time.monotonic() > latest:
            late = ", ".join(key for key in keys if not board.has([key]))
            raise RankLostError(
                f"rank {late} did not come within {timeout.total_seconds():g} s to tell on which GPU it computes: "
                "every rank must make its group, on a GPU"
            )
        pause.sleep()


def gpu_uuid(device: torch.device) -> str:
    """Returns what no other GPU of any machine has."""
    return str(torch.cuda.get_device_properties(device).uuid)
