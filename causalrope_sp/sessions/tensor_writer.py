"""Writing of a safetensors file tensor by tensor, so that not all of them must be in memory at once.

A file is the length of its header in 8 bytes, the header, and the tensors one after the other. The header is JSON: the
dtype, shape and place of each tensor, and a dictionary of texts.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from os import PathLike

import torch
from torch import Tensor

from causalrope_sp.errors import ConfigError, OutputError
from causalrope_sp.io.whole_files import whole_file
from causalrope_sp.weights.tensor_files import DTYPES

NAMES: dict[object, str] = {**{dtype: name for name, dtype in DTYPES.items()}, torch.int8: "I8"}


@dataclass(frozen=True)
class TensorPlan:
    """A tensor that is going to be written: its name, shape and dtype."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """The bytes of its data."""
        return prod(self.shape) * self.dtype.itemsize


def write_tensors(
    path: str | PathLike[str], plans: Sequence[TensorPlan], tensors: Iterator[Tensor], metadata: Mapping[str, str]
) -> None:
    """Writes a safetensors file to a temporary name, and gives it its own name when it is complete and on the disk.

    Args:
        path: the file. Where there is one already, it stays as it is until the new one is complete.
        plans: the tensors in the order in which they are written, those of the widest numbers first, as their places
            must be multiples of what a number takes.
        tensors: the tensors in this order. All of them are taken even if writing fails, since other ranks may take
            part in making them.
        metadata: texts by name.

    Raises:
        ConfigError: a tensor is not as planned, or there are fewer or more.
        OutputError: the file cannot be written, another process is writing it, or its path is no regular file's. What
            was written is removed.
    """
    try:
        with whole_file(path) as stream:
            stream.write(_header(plans, metadata))
            for plan in plans:
                stream.write(_bytes_of(plan, next(tensors, None)))
            if next(tensors, None) is not None:
                raise ConfigError(f"there are more tensors than the {len(plans)} that were to be written")
    except (OutputError, ValueError):
        deque(tensors, maxlen=0)
        raise


def _header(plans: Sequence[TensorPlan], metadata: Mapping[str, str]) -> bytes:
    """The header and its length; spaces make it a multiple of 8 bytes long."""
    described: dict[str, object] = {"__metadata__": dict(metadata)}
    start = 0
    for plan in plans:
        stop = start + plan.bytes
        offsets = [start, stop]
        described[plan.name] = {"dtype": NAMES[plan.dtype], "shape": plan.shape, "data_offsets": offsets}
        start = stop
    text = json.dumps(described).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _bytes_of(plan: TensorPlan, tensor: Tensor | None) -> memoryview:
    """The bytes of a tensor, which are copied only if they are elsewhere or not in order."""
    if tensor is None or (tuple(tensor.shape), tensor.dtype) != (plan.shape, plan.dtype):
        found = None if tensor is None else (tuple(tensor.shape), tensor.dtype)
        raise ConfigError(f"{plan.name} was to be {plan.shape} in {plan.dtype}, not {found}")
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
