"""Tells models apart by their weights."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import nn

from causalrope_sp.weights.tensor_files import WeightFiles

_SAMPLES = 4  # numbers of a tensor that tell its file from another
_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def digest(model: nn.Module) -> str:
    """Tells weights apart by two sums over their bits, one weighted by place: quick, and done where they lie."""
    total = 0
    for parameter in model.parameters():
        bits = parameter.detach().flatten().view(_WORDS[parameter.element_size()])
        for piece in bits.split(1 << 24):
            words = piece.long()
            place = torch.arange(1, len(words) + 1, device=words.device)
            total = (31 * total + int(words.sum()) + 7 * int((words * place).sum())) % (1 << 64)
    return f"{total:016x}"


def fingerprint(files: WeightFiles, names: Iterable[str]) -> str:
    """Tells open files apart by names, shapes, dtypes and a few numbers of every tensor, a page of the file each."""
    total = hashlib.blake2b(digest_size=8)
    for name in sorted(names):
        numbers = files.read(name).flatten()
        some = numbers[:: max(1, len(numbers) // _SAMPLES)].contiguous()
        total.update(f"{name} {files.tensors[name].shape} {some.dtype}".encode())
        total.update(some.view(torch.uint8).numpy().tobytes())
    return total.hexdigest()
