"""The exchange primitives: every collective of the library is called here and nowhere else.

Shards of a frame differ by at most one token, so pieces from different ranks differ in size: an all-to-all takes
split sizes, an all-gather is padded to the largest shard for the wire and stripped at once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

# torch 2.13 renamed all_gather_into_tensor and warns at every call of the old name
_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def all_to_all(pieces: Sequence[Tensor], shapes: Sequence[Sequence[int]], group: dist.ProcessGroup) -> list[Tensor]:
    """Sends pieces[r] to rank r and returns what the ranks sent here; `shapes` are the shapes of that, by rank."""
    send_sizes = [piece.numel() for piece in pieces]
    receive_sizes = [torch.Size(shape).numel() for shape in shapes]
    sent = torch.cat([piece.reshape(-1) for piece in pieces])
    received = torch.empty(sum(receive_sizes), dtype=sent.dtype, device=sent.device)
    dist.all_to_all_single(received, sent, receive_sizes, send_sizes, group)
    return [flat.view(*shape) for flat, shape in zip(received.split(receive_sizes), shapes, strict=True)]


def all_gather(x: Tensor, sizes: Sequence[int], dim: int, group: dist.ProcessGroup) -> list[Tensor]:
    """Every rank's x, in order of rank; they differ only along `dim`, whose length on rank r is sizes[r]."""
    widest = max(sizes)
    x = x.transpose(0, dim)
    if len(x) < widest:
        x = torch.cat([x, x.new_zeros(widest - len(x), *x.shape[1:])])
    gathered = torch.empty(len(sizes) * widest, *x.shape[1:], dtype=x.dtype, device=x.device)
    _all_gather_single(gathered, x.contiguous(), group)
    return [piece[:size].transpose(0, dim) for piece, size in zip(gathered.split(widest), sizes, strict=True)]
