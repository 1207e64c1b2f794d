"""Checks of the tensors, numbers and texts of a saved session."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

import torch
from torch import Tensor

from causalrope_sp.checks import check_whole, shown
from causalrope_sp.errors import ConfigError


def check_tensor(what: str, tensor: Tensor, axes: str, dtypes: Iterable[torch.dtype], empty: str = "") -> None:
    """Checks the axes and the dtype of a tensor.

    Args:
        what: names it in the message.
        tensor: the tensor.
        axes: the names of its axes.
        dtypes: those that it may have.
        empty: the axes that may be of length 0.

    Raises:
        ConfigError: it has another number of axes, an axis of length 0, or another dtype.
    """
    names, allowed = axes.split(), list(dtypes)
    if tensor.ndim != len(names) or any(n == 0 and a not in empty.split() for n, a in zip(tensor.shape, names)):
        raise ConfigError(f"{what} must be of shape ({', '.join(names)}), not {tuple(tensor.shape)}")
    if tensor.dtype not in allowed:
        expected = ", ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
        raise ConfigError(f"{what} must be in {expected}, not {str(tensor.dtype).removeprefix('torch.')}")


def check_rising(what: str, numbers: Iterable[int], most: int) -> None:
    """Checks whole numbers.

    Args:
        what: what happens at them, for the message.
        numbers: the numbers.
        most: the largest that the last one may be.

    Raises:
        ConfigError: they do not begin at 0, do not rise, or one is larger than `most`.
    """
    found = [check_whole(f"a number of those that {what}", number, 0, most) for number in numbers]
    if found[:1] != [0] or any(a >= b for a, b in pairwise(found)):
        raise ConfigError(f"{what} at rising numbers from 0, not at {shown(found)}")


def writable(what: str, text: str | None) -> str | None:
    """Returns a text without halves of surrogate pairs, which no file can hold.

    Args:
        what: names it in the message.
        text: the text, or None.

    Raises:
        ConfigError: it is neither.
    """
    if text is not None and not isinstance(text, str):
        raise ConfigError(f"{what} must be a text or none, not {shown(text)}")
    return None if text is None else text.encode(errors="replace").decode()
