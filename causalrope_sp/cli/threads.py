"""How many threads torch computes with on the CPU, and how they wait; both are read once, when torch is loaded."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import MutableMapping
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")  # in a container the process's own
_log = logging.getLogger(__name__)


def settle_threads(environment: MutableMapping[str, str] = os.environ, cgroup: Path = CGROUP) -> None:
    """Lets threads sleep while they wait, and starts no more of them than there is processor time for.

    Threads that wait by spinning take the processor from those that they wait for: on a busy machine that makes a video
    twenty times slower. What the environment sets already, as torchrun does for its ranks, is kept.

    Args:
        environment: the process's environment, before torch is loaded.
        cgroup: where the limit of the process's control group is found.
    """
    environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    environment.setdefault("OMP_NUM_THREADS", str(_threads(cgroup)))


def log_threads(environment: MutableMapping[str, str] = os.environ) -> None:
    """Logs what torch was told."""
    threads, wait = environment.get("OMP_NUM_THREADS", "?"), environment.get("OMP_WAIT_POLICY", "?").lower()
    _log.debug("%s CPU threads, which wait %sly", threads, wait)


def _threads(cgroup: Path) -> int:
    """The processors that this process may run on, or the share of them that its control group is granted."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = (cgroup / "cpu.max").read_text().split()
        granted = math.floor(int(quota) / int(period))
    except (OSError, ValueError):  # no control group of version 2, or "max": no limit
        granted = allowed
    return max(1, min(allowed, granted))
