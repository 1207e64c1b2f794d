"""Hashes that tell models, and weight files, apart by their content."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import nn

from causalrope_sp.weights.tensor_files import WeightFiles

_SAMPLES = 4  # about how many numbers of each tensor `fingerprint` reads
_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def digest(model: nn.Module) -> str:
    """Computes a hash of a model's weights, on the device that holds them.

    The hash is made of two sums over the bits of every parameter, one of them weighted by position. It tells two sets
    of weights apart; it does not protect against an attacker.

    Returns:
        16 hexadecimal digits.
    """
    total = 0
    for parameter in model.parameters():
        bits = parameter.detach().flatten().view(_WORDS[parameter.element_size()])
        for piece in bits.split(1 << 24):
            words = piece.long()
            position = torch.arange(1, len(words) + 1, device=words.device)
            total = (31 * total + int(words.sum()) + 7 * int((words * position).sum())) % (1 << 64)
    return f"{total:016x}"


def fingerprint(files: WeightFiles, names: Iterable[str]) -> str:
    """Computes a hash of an open checkpoint from the names, shapes, dtypes and a few numbers of its tensors.

    Args:
        files: the open checkpoint.
        names: the stored names of the tensors that count.

    Returns:
        16 hexadecimal digits.

    Raises:
        CheckpointError: a tensor cannot be read.
    """
    total = hashlib.blake2b(digest_size=8)
    for name in sorted(names):
        numbers = files.raw(name).flatten()
        sampled = numbers[:: max(1, len(numbers) // _SAMPLES)].contiguous()
        total.update(f"{name} {files.tensors[name].shape} {sampled.dtype}".encode())
        total.update(sampled.view(torch.uint8).numpy().tobytes())
    return total.hexdigest()
