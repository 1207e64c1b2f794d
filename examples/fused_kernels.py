"""Calls the kernels' operations directly: one layer's self-attention of a chunk on a ring of frame slots.

The grid has 4×6 tokens a frame, attention 2 heads of width 16. Chunk 3 has frames 6 and 7; the ring has six slots and
holds frames 2 to 7.
"""

from __future__ import annotations

import torch

from causalrope_kernels import Keys, Projection, Rotation, Slots, attention, norm_rope_store

ROWS, COLUMNS, HEADS, WIDTH, SLOTS, FRAMES = 4, 6, 2, 16, 6, (6, 7)
TOKENS, DIM = ROWS * COLUMNS, HEADS * WIDTH
PAIRS = WIDTH // 2 - 2 * (WIDTH // 6), WIDTH // 6, WIDTH // 6  # pairs of channels for time, row, column


def table(positions: int, pairs: int) -> torch.Tensor:
    """Returns the cosines and sines of every position on an axis, (positions, 2, pairs)."""
    angles = torch.outer(torch.arange(positions, dtype=torch.float64), 10_000.0 ** (-torch.arange(pairs) / pairs))
    return torch.stack([angles.cos(), angles.sin()], 1).float()


times = torch.tensor(FRAMES)  # a tensor on the device, so that no kernel is compiled for one global time index
time, row, column = (table(positions, pairs) for positions, pairs in zip((1024, ROWS, COLUMNS), PAIRS, strict=True))
rotation = Rotation(time, row, column, times, times, start=0, tokens=TOKENS, columns=COLUMNS)
qkv = torch.randn(1, len(FRAMES), TOKENS, 3 * DIM)
projection = Projection(qkv, torch.ones(DIM), torch.ones(DIM), rotation, HEADS, eps=1e-6)

q = torch.empty(1, len(FRAMES), TOKENS, HEADS, WIDTH)
ring_k, ring_v = torch.randn(2, 1, SLOTS, TOKENS, HEADS, WIDTH)
slots = times % SLOTS
norm_rope_store(projection, q=[Slots(q)], k=[Slots(ring_k, slots)], v=[Slots(ring_v, slots)])

keys = Keys(ring_k.flatten(1, 2), ring_v.flatten(1, 2), ranges=((0, SLOTS * TOKENS),))  # rows of tokens, not slots
print(attention(q.flatten(1, 2), keys).shape)
