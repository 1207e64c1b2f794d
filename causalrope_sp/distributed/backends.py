"""What a process group must have for the device that its ranks compute on: the backend, and a GPU for every rank."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from causalrope_sp.errors import ConfigError

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
        got = found or " and ".join(f"{backend} for {kind}" for kind, backend in backends.items())
        raise ConfigError(f"group: expected {expected}, got {got}: call {ADVICE[device.type]}")


def check_own_gpu(group: dist.ProcessGroup, device: torch.device) -> None:
    """Checks that no other rank has told that it computes on this rank's GPU, and tells the others. It waits for none,
    so that of two ranks on one GPU the later one raises.

    Args:
        group: the process group, whose NCCL would fail at the first collective.
        device: where this rank computes.

    Raises:
        ConfigError: another rank computes on the GPU.
    """
    if device.type != "cuda":
        return
    store: Any = group.get_group_store()  # its type stubs lack half of its methods
    own, rank = gpu_uuid(device), group.rank()
    store.set(f"causalrope/gpu/{rank}", own)
    for other in range(group.size()):
        key = f"causalrope/gpu/{other}"
        if other != rank and store.check([key]) and store.get(key).decode() == own:
            raise ConfigError(
                f"rank {rank} has no GPU of its own: it computes on {device}, as rank {other} does; give every rank of "
                "a machine its own, such as device=f'cuda:{LOCAL_RANK}'"
            )


def gpu_uuid(device: torch.device) -> str:
    """Returns what no other GPU of any machine has."""
    return str(torch.cuda.get_device_properties(device).uuid)
