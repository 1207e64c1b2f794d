"""Reading of a codec's tensors from a file that must hold exactly these; the error names every difference."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from causalrope_sp.errors import CheckpointError
from causalrope_sp.weights.finite import all_finite, refuse_broken
from causalrope_sp.weights.messages import some
from causalrope_sp.weights.tensor_files import WeightFiles


def shape_of(files: WeightFiles, name: str, axes: int) -> tuple[int, ...]:
    """Returns the shape of a tensor that a configuration is inferred from.

    Args:
        files: the open file.
        name: the tensor's stored name.
        axes: how many axes it must have.

    Raises:
        CheckpointError: the tensor is missing, is empty, or has another number of axes.
    """
    if name not in files.tensors:
        raise CheckpointError(f"{files.path}: 1 missing: {name}")
    shape = files.tensors[name].shape
    if len(shape) != axes or 0 in shape:
        raise CheckpointError(f"{files.path}: {name} is {shape}, expected {axes} axes")
    return shape


def read_exactly(files: WeightFiles, expected: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Reads the tensors of a file in float32, as copies.

    Args:
        files: the open file.
        expected: the stored name and the shape of every tensor that the file must hold.

    Returns:
        The tensors by their stored names.

    Raises:
        CheckpointError: a tensor is missing, unexpected, of another shape, not of floating point, or holds NaN or
            infinity.
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
