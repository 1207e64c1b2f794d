"""Launches Triton kernels with little work for the host.

Triton binds and specializes the arguments of every launch anew, which costs the host more than the launch itself. A
`Kernel` does that once for arguments of the same types, alignments and numbers, and then calls the compiled binary.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from causalrope_kernels.tables import is_aligned

_NO_SWITCH = nullcontext()


class Kernel:
    """A Triton kernel whose constants are the last of its parameters.

    Args:
        function: the kernel, as `triton.jit` returns it.
    """

    def __init__(self, function: Any) -> None:
        self.function = function
        self._launches: dict[tuple[Any, ...], Callable[..., None]] = {}

    def launch(
        self,
        grid: tuple[int, ...],
        tensors: tuple[Any, ...],
        numbers: tuple[Any, ...],
        constants: tuple[Any, ...],
        **options: int,
    ) -> None:
        """Launches the kernel on the device of its first tensor.

        Args:
            grid: the number of programs on each axis.
            tensors: the first arguments: tensors, tuples of tensors, or None.
            numbers: the arguments after them: numbers, or tuples of numbers.
            constants: the constants, in the order of the parameters.
            options: `num_warps` and `num_stages`, which depend on `numbers` and `constants` alone.
        """
        key = grid, _first(tensors).device, numbers, constants, *[_kind(x) for x in tensors]
        again = self._launches.get(key)
        if again is None:
            self._launches[key] = self.prepared(grid, tensors, numbers, constants, **options)
        else:
            again(*tensors)

    def prepared(
        self,
        grid: tuple[int, ...],
        tensors: tuple[Any, ...],
        numbers: tuple[Any, ...],
        constants: tuple[Any, ...],
        **options: int,
    ) -> Callable[..., None]:
        """Launches the kernel; the arguments are those of `launch`.

        Returns:
            A function that launches it again on other tensors of the same device, dtypes and alignments to 16 bytes.
        """
        device = _first(tensors).device
        with on(device):
            binary = self.function[grid](*tensors, *numbers, *constants, **options)
        rest = numbers + constants
        if binary is None:
            compiled_for = self._binary_kinds(tensors)

            def interpreted(*tensors: Any) -> None:
                for name, kind in self._binary_kinds(tensors).items():
                    known = compiled_for[name]
                    assert kind == known, f"{name}: a binary for {known} would take {kind} for the same"
                self.function[grid](*tensors, *rest, **options)

            return interpreted
        runner = binary[grid + (1,) * (3 - len(grid))]

        def again(*tensors: Any) -> None:
            if device.type == "cuda" and torch.cuda.current_device() != device.index:
                with torch.cuda.device(device):
                    runner(*tensors, *rest)
            else:
                runner(*tensors, *rest)

        return again

    def _binary_kinds(self, tensors: tuple[Any, ...]) -> dict[str, Any]:
        """What a binary depends on of each tensor, by the names of the parameters."""
        decorated = getattr(self.function, "kwargs", {})  # only an interpreted kernel keeps what it was decorated with
        of_any_alignment = decorated.get("do_not_specialize_on_alignment") or ()
        named = zip(self.function.arg_names, tensors, strict=False)
        return {name: x.dtype if name in of_any_alignment else _kind(x) for name, x in named}


def _first(tensors: tuple[Any, ...]) -> Tensor:
    first = tensors[0]
    return first[0] if first.__class__ is tuple else first


def _kind(x: Any) -> Any:
    """What Triton may compile another binary for: the dtype and the alignment of a tensor, and whether there is one."""
    if x is None:
        return None
    if x.__class__ is tuple:
        return tuple(map(_kind, x))
    return x.dtype, is_aligned(x)


def on(device: torch.device) -> AbstractContextManager[object]:
    """Returns a context in which a device is current, since Triton launches on the thread's current device."""
    if device.type != "cuda" or torch.cuda.current_device() == device.index:
        return _NO_SWITCH
    return torch.cuda.device(device)


def padded(size: int) -> int:
    """Returns the next power of two, the size of a block that holds so many numbers."""
    return 1 << max(0, size - 1).bit_length()


def blocks_of(count: int, size: int) -> int:
    """Returns how many blocks of a size hold `count` items."""
    return -(-count // size)
