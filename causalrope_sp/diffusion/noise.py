"""Noise that depends on nothing but (seed, stream, chunk, step): the same on every rank and every device."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor

from causalrope_sp.grid import Chunk

Noise = Callable[[Chunk, int], Tensor]
"""(chunk, step) -> (B, F, C, H, W): the starting noise at step 0, fresh noise before each later step."""


def seeded_noise(seed: int, shape_BCHW: tuple[int, int, int, int], stream: int = 0) -> Noise:
    """A noise source whose every draw has a generator of its own, on the CPU, in float32."""
    batch, *frame = shape_BCHW

    def draw(chunk: Chunk, step: int) -> Tensor:
        return torch.randn(batch, chunk.frames, *frame, generator=keyed_generator(seed, stream, chunk.index, step))

    return draw


def keyed_generator(*key: int) -> torch.Generator:
    """A CPU generator of its own for every tuple of whole numbers."""
    digest = hashlib.blake2b(" ".join(map(str, key)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
