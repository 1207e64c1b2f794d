"""A codec's tensors out of a file: exactly those that it has, or one line that says what differs."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from causalrope_sp.errors import CheckpointError
from causalrope_sp.weights.finite import all_finite, refuse_broken
from causalrope_sp.weights.messages import some
from causalrope_sp.weights.tensor_files import WeightFiles


def shape_of(files: WeightFiles, name: str, axes: int) -> tuple[int, ...]:
    """The shape of a tensor from which a configuration is read.

    Raises:
        CheckpointError: it is not there, or has another number of axes.
    """
    if name not in files.tensors:
        raise CheckpointError(f"{files.path}: 1 missing: {name}")
    shape = files.tensors[name].shape
    if len(shape) != axes or 0 in shape:
        raise CheckpointError(f"{files.path}: {name} is {shape}, expected {axes} axes")
    return shape


def read_exactly(files: WeightFiles, expected: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """The tensors of these names and shapes in float32, in memory of their own.

    Raises:
        CheckpointError: one is missing, left over, of another shape, not of floating point, or NaN or infinite.
    """
    held = files.tensors
    misshapen = [
        f"{name} is {held[name].shape}, expected {shape}"
        for name, shape in expected.items()
        if name in held and held[name].shape != shape
    ]
    kinds = {
        "missing": [name for name in expected if name not in held],
        "unexpected": sorted(held.keys() - expected.keys()),
        "of a wrong shape": misshapen,
        "not of floating point": [name for name in expected if name in held and not _is_floating(held[name].dtype)],
    }
    problems = [f"{len(names)} {kind}: {some(names)}" for kind, names in kinds.items() if names]
    if problems:
        raise CheckpointError(f"{files.path}: {'; '.join(problems)}")
    read = {name: files.read(name).to(torch.float32, copy=True) for name in expected}
    refuse_broken(files.path, [name for name, tensor in read.items() if not all_finite(tensor)], torch.float32)
    return read


def _is_floating(dtype: torch.dtype | str) -> bool:
    return isinstance(dtype, torch.dtype) and dtype.is_floating_point
