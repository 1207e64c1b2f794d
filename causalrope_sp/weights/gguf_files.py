"""Reading of GGUF files: the `gguf` package parses them and dequantizes one tensor at a time."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from causalrope_sp.errors import CheckpointError, first_line, printable
from causalrope_sp.weights.stored_formats import NOMINAL

_SHAPE_OF = "comfy.gguf.orig_shape."  # of tensors with more axes than the four that GGML has
_PLAIN = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass
class GgufHome:
    """The tensors of an open file.

    Attributes:
        file: the file.
        described: the shape of each tensor, and its dtype or, of a quantized one, the dtype that it counts as.
        metadata: the file's texts by key.
    """

    file: Path
    described: dict[str, tuple[tuple[int, ...], torch.dtype | str]] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    _tensors: dict[str, Any] = field(default_factory=dict)

    def get_tensor(self, name: str) -> Tensor:
        """Returns a tensor, in float32 if it is quantized.

        Raises:
            CheckpointError: the package has no arithmetic for its type.
        """
        import gguf

        stored, shape = self._tensors[name], self.described[name][0]
        if stored.tensor_type.name in _PLAIN:
            return self.raw(name).reshape(shape)
        try:
            with np.errstate(all="ignore"):  # what is not finite is looked for by whoever reads weights
                numbers = gguf.quants.dequantize(stored.data, stored.tensor_type)
        except (NotImplementedError, ValueError) as error:
            kind = stored.tensor_type.name
            raise CheckpointError(f"{self.file}: {printable(name)} is stored as {kind}, which is not read") from error
        return torch.from_numpy(numbers).reshape(shape)

    def raw(self, name: str) -> Tensor:
        """Returns a tensor's numbers, or of a quantized one its bytes, as a view of the file."""
        stored = self._tensors[name]
        numbers = torch.from_numpy(stored.data)
        return numbers.view(torch.bfloat16) if stored.tensor_type.name == "BF16" else numbers


def open_gguf(file: Path) -> GgufHome:
    """Opens a GGUF file, memory-mapped.

    Args:
        file: the file.

    Raises:
        CheckpointError: the package is missing, or the file is truncated or contradicts itself.
    """
    try:
        import gguf
    except ImportError as error:
        raise CheckpointError(f"{file}: a GGUF file, which needs the package gguf: pip install gguf") from error
    try:
        reader = gguf.GGUFReader(file, "c")  # private pages: torch takes no memory that it cannot write
        home = GgufHome(file)
        for key, entry in reader.fields.items():
            if entry.types and entry.types[-1] == gguf.GGUFValueType.STRING and len(entry.data) == 1:
                home.metadata[key] = str(entry.contents())
        for stored in reader.tensors:
            shape = tuple(int(size) for size in reversed(stored.shape.tolist()))
            original = reader.get_field(_SHAPE_OF + stored.name)
            if original is not None:
                shape = tuple(int(size) for size in original.contents())
            if prod(shape) != stored.n_elements or min(shape, default=1) < 0:
                raise ValueError(f"{printable(stored.name)} has {stored.n_elements} numbers and the shape {shape}")
            home.described[stored.name] = shape, _PLAIN.get(stored.tensor_type.name, NOMINAL)
            home._tensors[stored.name] = stored
    except Exception as error:  # the parser raises whatever an impossible size leads to
        raise CheckpointError(f"{file}: truncated or not a GGUF file ({printable(first_line(error))})") from error
    return home
