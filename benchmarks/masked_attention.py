"""Attention on one process under a mask: the emulation of what heads leave out, and oracles that know all scores.

Shapes: B batch, F frames, S tokens of a frame, T queries, L keys, H heads, d head width, N frames of the window.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import ceil
from unittest.mock import patch

import torch
from torch import Tensor

from causalrope_kernels import Keys, PassOperations, Source
from causalrope_kernels.quantized_heads import dequantize
from causalrope_sp import Chunk, LatentGrid
from causalrope_sp.attention import base
from causalrope_sp.attention.base import write_chunk
from causalrope_sp.cache.kv_cache import KVCache
from causalrope_sp.cache.layer_cache import LayerCache
from causalrope_sp.heads import HeadPolicy

# Returns which keys are attended, broadcast to (B, H, T, L), by the layer, the chunk of the queries, the frames of the
# keys in their order, and all scores, (B, H, T, L).
Rule = Callable[[int, Chunk, Sequence[int], Tensor], Tensor]


@contextmanager
def attending(rule: Rule) -> Iterator[list[int]]:
    """Lets queries attend the keys that a rule returns, of a cache that holds the whole window of every head.

    Yields:
        Two numbers that grow: pairs of a query and a key of the window, and those of them that are attended.
    """
    counts = [0, 0]

    def attend(source: Source, cache: LayerCache, chunk: Chunk, operations: PassOperations, *rest: None) -> Tensor:
        q_BFSHD = write_chunk(source, cache, chunk, operations, *rest)
        assert isinstance(cache._cache, KVCache)
        (keys,) = cache.keys(chunk)
        q_BTHD, (k_BLHD, v_BLHD) = q_BFSHD.flatten(1, 2), _rows(keys, q_BFSHD.dtype)
        scores_BHTL = torch.einsum("bthd,blhd->bhtl", q_BTHD, k_BLHD) * q_BTHD.shape[-1] ** -0.5
        frames = list(cache._cache.window.held(chunk.stop).values())  # in the order of slots
        seen = rule(cache.index, chunk, frames, scores_BHTL).expand_as(scores_BHTL)
        counts[0] += seen.numel()
        counts[1] += int(seen.sum())
        weights_BHTL = scores_BHTL.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0.0)
        return torch.einsum("bhtl,blhd->bthd", weights_BHTL, v_BLHD).view(q_BFSHD.shape)

    with patch.object(base, "attend_chunk", attend):
        yield counts


def _rows(keys: Keys, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """All keys and values that are attended, without scales."""
    assert keys.rotate_on_read is None, "keys are rotated by their global time index"
    found = []
    for x, scales in ((keys.k, keys.k_scales), (keys.v, keys.v_scales)):
        x_BLHD = torch.cat([x[:, first:stop] for first, stop in keys.rows], 1)
        if scales is not None:
            scales_BLH = torch.cat([scales[:, first:stop] for first, stop in keys.rows], 1)
            x_BLHD = dequantize(x_BLHD, scales_BLH, dtype)
        found.append(x_BLHD)
    return found[0], found[1]


def of_frames(seen_HN: Tensor, scores_BHTL: Tensor) -> Tensor:
    """A mask of the keys, by which frames each head sees."""
    tokens = scores_BHTL.shape[-1] // seen_HN.shape[-1]
    return seen_HN.repeat_interleave(tokens, -1)[None, :, None]


def windows(policy: HeadPolicy, window: int, sink: int, grid: LatentGrid | None = None) -> Rule:
    """Every head sees the sink and the newest of the other frames, as many in all as its window has, and of these its
    bands of rows.

    Args:
        policy: the windows.
        window: the window of the stream, in latent frames.
        sink: its sink.
        grid: the latent frame in tokens, which a policy of rows needs.
    """
    sizes = policy.frames(window)

    def rule(layer: int, chunk: Chunk, frames: Sequence[int], scores_BHTL: Tensor) -> Tensor:
        others = sorted(frame for frame in frames if frame >= sink)
        by_head = [others[max(0, len(others) - (size - sink)) :] if size else None for size in sizes[layer]]
        seen = [[newest is not None and (f < sink or f in newest) for f in frames] for newest in by_head]
        mask = of_frames(torch.tensor(seen), scores_BHTL)
        if grid is None:
            return mask
        row = torch.arange(grid.tokens) // grid.columns
        bands_HS = torch.stack([row // (rows or grid.rows) for rows in policy.rows_of_heads[layer]])
        near_HSS = (bands_HS[:, :, None] - bands_HS[:, None]).abs() <= 1
        return mask & near_HSS.repeat(1, scores_BHTL.shape[2] // grid.tokens, len(frames))

    return rule


def oracle_frames(share: float) -> Rule:
    """Each head of a chunk sees those of the frames that have most of the attention mass of its queries in the pass.

    Args:
        share: which share of the frames; the first chunk sees all.
    """

    def rule(layer: int, chunk: Chunk, frames: Sequence[int], scores_BHTL: Tensor) -> Tensor:
        count = len(frames) if chunk.start == 0 else ceil(share * len(frames))
        mass_HN = scores_BHTL.softmax(-1).unflatten(-1, (len(frames), -1)).sum((0, 2, 4))
        return of_frames(_largest(mass_HN, count), scores_BHTL)

    return rule


def oracle_tokens(share: float) -> Rule:
    """Each query of each head sees the keys with the largest scores.

    Args:
        share: which share of the keys; the first chunk sees all.
    """

    def rule(layer: int, chunk: Chunk, frames: Sequence[int], scores_BHTL: Tensor) -> Tensor:
        keys = scores_BHTL.shape[-1]
        return _largest(scores_BHTL, keys if chunk.start == 0 else ceil(share * keys))

    return rule


def _largest(x: Tensor, count: int) -> Tensor:
    """Which entries are among the `count` largest of their row."""
    return torch.zeros_like(x, dtype=torch.bool).scatter_(-1, x.topk(count, -1).indices, True)
