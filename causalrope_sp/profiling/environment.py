"""What a report says of the machine and the software that it comes from."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from causalrope_sp.version import __version__

CHECKOUT = Path(__file__).parents[2]  # if the package runs from one
CPUINFO = Path("/proc/cpuinfo")


def machine_fields(device: torch.device) -> dict[str, Any]:
    """Describes a device in the form of JSON.

    Args:
        device: where this rank computes.

    Returns:
        Its name, its memory in bytes, and the driver of a GPU or the threads that torch computes with on a CPU.
    """
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        driver = _answer("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        return {"device": found.name, "memory_bytes": found.total_memory, "driver": driver and driver.split()[0]}
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {"device": cpu_name(CPUINFO), "memory_bytes": memory, "threads": torch.get_num_threads()}


def version_fields() -> dict[str, str | None]:
    """Returns the versions of Python and the packages, and the commit of this one; None for what is not there."""
    try:
        triton = metadata.version("triton")
    except metadata.PackageNotFoundError:
        triton = None
    return {
        "causalrope_sp": __version__,
        "commit": commit(CHECKOUT),
        "torch": torch.__version__,
        "triton": triton,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
    }


def cpu_name(cpuinfo: Path) -> str:
    """Returns the processor's name from a file such as /proc/cpuinfo, or its architecture if the file has none."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def commit(folder: Path) -> str | None:
    """Returns the commit of a git checkout, with "-dirty" if files have changed since; None if it is no checkout."""
    if not (folder / ".git").exists():  # a folder above may be the checkout of something else
        return None
    return _answer("git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")


def _answer(*command: str) -> str | None:
    """What a command prints, or None if it is not there or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() or None
    except (OSError, subprocess.CalledProcessError):
        return None
