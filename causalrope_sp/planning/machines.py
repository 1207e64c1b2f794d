"""The machines that costs are predicted for. Rates come from data sheets or are guesses unless they were measured."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise

import torch

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Machine:
    """The rates of one rank.

    Args:
        name: how reports name the machine.
        matmul: FLOP/s of large matrix products.
        attention: FLOP/s of attention.
        bandwidth: bytes/s of the device's memory.
        memory: bytes of the device's memory.
        link: bytes/s that the rank receives in a collective.
        latency: seconds that a collective takes before its first byte.
        fp8: how many times faster than others products of fp8 numbers are; 1 where there are none.
    """

    name: str
    matmul: float
    attention: float
    bandwidth: float
    memory: float
    link: float
    latency: float
    fp8: float = 1.0


# name: dense bf16 FLOP/s of large products, of attention, bytes/s of memory, bytes of memory. What large products reach
# is about 80 % of the data sheet's peak (H100: 790 of 989), attention about 60 %.
GPUS = {
    "h200": (790e12, 600e12, 4.8e12, 141e9),
    "h100": (790e12, 600e12, 3.35e12, 80e9),
    "a800": (250e12, 190e12, 2.0e12, 80e9),
    "a100": (250e12, 190e12, 2.0e12, 80e9),
    "l40s": (180e12, 140e12, 0.86e12, 48e9),
    "rtx4090": (150e12, 120e12, 1.0e12, 24e9),
    "cpu": (60e9, 40e9, 20e9, 24e9),
}
FP8 = {"h200": 2.0, "h100": 2.0, "l40s": 2.0, "rtx4090": 2.0}  # by data sheets; on H100 users report less
# name: bytes/s that a rank receives in a collective, seconds before the first byte
LINKS = {
    "nvlink": (350e9, 15e-6),
    "nvlink-a800": (150e9, 15e-6),
    "pcie": (20e9, 20e-6),
    "infiniband": (40e9, 25e-6),
    "ethernet": (10e9, 50e-6),
    "loopback": (1e9, 200e-6),
}
USUAL_LINKS = {"a800": "nvlink-a800", "l40s": "pcie", "rtx4090": "pcie"}  # of GPUs without NVLink's full rate


def machine(gpu: str, link: str) -> Machine:
    """Returns the machine of a GPU and a link.

    Args:
        gpu: one of `GPUS`.
        link: one of `LINKS`.

    Raises:
        KeyError: a name is unknown.
    """
    return Machine(f"{gpu}, {link}", *GPUS[gpu], *LINKS[link], FP8.get(gpu, 1.0))


def default_machine(device: torch.device) -> Machine:
    """Returns the machine that predictions assume for this device: a GPU by its name, with its own memory, or a CPU."""
    if device.type != "cuda":
        return CPU
    memory = torch.cuda.get_device_properties(device).total_memory
    return replace(machine_of(torch.cuda.get_device_name(device)), memory=float(memory))


@cache  # an assumption is logged once
def machine_of(device_name: str) -> Machine:
    """Returns the machine that a driver's name of a GPU stands for, such as "NVIDIA A100-SXM4-80GB"; an H100 for an
    unknown one."""
    words = device_name.lower().replace("-", " ").split()
    names = {*words, *(a + b for a, b in pairwise(words))}  # "RTX 4090"
    known = next((gpu for gpu in GPUS if gpu in names), None)
    gpu = known or "h100"
    found = machine(gpu, "pcie" if "pcie" in words else USUAL_LINKS.get(gpu, "nvlink"))
    if known is None:
        _log.warning("%s has no known rates: predictions assume %s", device_name, found.name)
    return found


H100, CPU = machine("h100", "nvlink"), machine("cpu", "loopback")
