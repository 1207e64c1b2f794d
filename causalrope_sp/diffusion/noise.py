"""Noise that depends on seed, stream, chunk and step alone, so that it is the same on every rank and every device."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor

from causalrope_sp.grid import Chunk

Noise = Callable[[Chunk, int], Tensor]
"""Returns the noise of a chunk, (B, F, C, H, W): starting noise for step 0, fresh noise for each later step."""


def seeded_noise(seed: int, shape_BCHW: tuple[int, int, int, int], stream: int = 0) -> Noise:
    """Makes a noise source; each draw has a generator of its own, on the CPU, and is float32.

    Args:
        seed: of the video.
        shape_BCHW: the shape of one latent frame with its batch.
        stream: the number of the stream, if several share a seed.
    """
    batch, *frame = shape_BCHW

    def draw(chunk: Chunk, step: int) -> Tensor:
        generator = keyed_generator(seed, stream, chunk.index, step)
        return torch.randn(batch, chunk.frames, *frame, generator=generator, dtype=torch.float32)

    return draw


def keyed_generator(*key: int) -> torch.Generator:
    """Returns a CPU generator seeded with a hash of the whole numbers `key`."""
    digest = hashlib.blake2b(" ".join(map(str, key)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
