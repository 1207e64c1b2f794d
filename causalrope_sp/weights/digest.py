"""Tells models apart by their weights."""

from __future__ import annotations

import torch
from torch import nn

_WORDS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


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
