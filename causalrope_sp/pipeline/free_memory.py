"""How much memory of a device is free."""

from __future__ import annotations

from pathlib import Path

import torch

from causalrope_sp.rank_environment import RankEnvironment


def free_bytes(device: torch.device) -> int | None:
    """Returns the free memory of a device in bytes, or None if it cannot be read. On a CPU it is this rank's share of
    the memory that is available without swapping."""
    if device.type == "cuda":
        own = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + own
    limits = [available_memory(Path("/proc/meminfo")), left_in_cgroup(Path("/sys/fs/cgroup"))]
    free = min((limit for limit in limits if limit is not None), default=None)
    # the ranks on this machine share its memory
    return None if free is None else free // RankEnvironment.read().local_world_size


def available_memory(meminfo: Path) -> int | None:
    """Returns the bytes of MemAvailable in a file such as /proc/meminfo, or None if it cannot be read."""
    try:
        lines = meminfo.read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError, IndexError):
        return None


def left_in_cgroup(cgroup: Path) -> int | None:
    """Returns the bytes that a container's limit leaves, reclaimable page cache included, or None without a limit."""
    try:
        limit, used = (int((cgroup / f"memory.{name}").read_text()) for name in ("max", "current"))
        fields = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
        return max(0, limit - used + int(fields.get("inactive_file", 0)))
    except (OSError, ValueError):  # no such group, or no limit: "max"
        return None
