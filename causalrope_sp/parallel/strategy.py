"""How self-attention crosses ranks. The base class is the group of one, where nothing crosses.

A strategy is given this rank's tokens of a pass, q, k and v normed and rotated by their global index, and returns
the attention output of the same tokens. What it caches, and in which split, is its own business.

Shapes: B batch, T = F·s tokens (F frames of the pass, s tokens of a frame on this rank), S tokens of a whole frame,
H heads, h heads on this rank, d head width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from causalrope_kernels import attention
from causalrope_sp.cache import LayerCache
from causalrope_sp.grid import Chunk, Shard


class Strategy:
    """Attention within one process.

    Args:
        shard: the tokens of a frame that this rank owns.
        heads: H, the model's heads.
    """

    name = "single"

    def __init__(self, shard: Shard, heads: int) -> None:
        self.shard, self.heads = shard, heads

    @property
    def stored_heads(self) -> int:
        """How many heads this rank caches; of a frame it caches all S tokens."""
        return self.heads

    def attend(
        self, q_BTHD: Tensor, k_BTHD: Tensor, v_BTHD: Tensor, cache: LayerCache, chunks: tuple[Chunk, ...]
    ) -> Tensor:
        """The attention output of this rank's tokens, (B, T, H, d). `chunks` follow one another in the tokens."""
        q, k, v = (self._frames(x) for x in (q_BTHD, k_BTHD, v_BTHD))
        return self._attend_whole(q, k, v, cache, chunks).flatten(1, 2)

    def _frames(self, x_BTHD: Tensor) -> Tensor:
        return x_BTHD.unflatten(1, (-1, self.shard.tokens))

    @staticmethod
    def _attend_whole(
        q_BFQHD: Tensor, k_BFSHD: Tensor, v_BFSHD: Tensor, cache: LayerCache, chunks: tuple[Chunk, ...]
    ) -> Tensor:
        """Chunk after chunk: write its keys and values, then attend all that it may see, (B, F, Q, H, d).

        The order matters: a later chunk may take over slots that an earlier one still reads.
        """
        sizes = [chunk.frames for chunk in chunks]
        outputs = []
        for chunk, q, k, v in zip(chunks, *(x.split(sizes, 1) for x in (q_BFQHD, k_BFSHD, v_BFSHD)), strict=True):
            cache.write(chunk, k, v)
            outputs.append(attention(q.flatten(1, 2), *cache.read(chunk)).view(q.shape))
        return torch.cat(outputs, 1)
