"""Fusion of the velocities that neighbouring chunks predict for the frames they share. Pure functions.

Shapes: B batch, F frames, F_o of the overlap, s tokens of a frame, E numbers in a token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def fuse(earlier_BFSE: Tensor, later_BFSE: Tensor) -> Tensor:
    """Fuses the velocities of an overlap linearly in time (Video Interface Networks, arXiv 2503.17539).

    ((F_o - W(k))·ε_i[k] + W(k)·ε_{i+1}[k]) / F_o over the frames k of the overlap of chunk i and chunk i + 1, where
    W(k) = k + 1/2 is the time of the frame's middle. The weights are then symmetric in time, and an overlap of one
    frame gives the mean of the two chunks. (The paper does not say where W(k) counts from; from 0 or from 1, one chunk
    would weigh more than the other.)

    Args:
        earlier_BFSE: the velocity by chunk i, (B, F_o, s, E).
        later_BFSE: the velocity by chunk i + 1, of the same shape.

    Returns:
        The fused velocity, (B, F_o, s, E).
    """
    frames = earlier_BFSE.shape[1]
    weight = (torch.arange(frames, dtype=earlier_BFSE.dtype, device=earlier_BFSE.device) + 0.5).view(-1, 1, 1)
    return ((frames - weight) * earlier_BFSE + weight * later_BFSE) / frames


def join(
    velocities: Sequence[Tensor],
    overlap: int,
    *,
    fused: bool,
    before: Tensor | None = None,
    after: Tensor | None = None,
) -> Tensor:
    """Joins the velocities of neighbouring chunks, so that each frame occurs once.

    Args:
        velocities: chunk by chunk, each (B, F, s, E).
        overlap: latent frames that neighbouring chunks share.
        fused: whether shared frames are fused; otherwise they take the velocity of the earlier chunk, which owns them.
        before: the velocity of the frames shared with the chunk before the first one; None if there is no such chunk.
        after: the velocity of the frames shared with the chunk after the last one; None if there is no such chunk, or
            if nothing is fused.

    Returns:
        The velocity of all frames that the chunks cover, (B, F, s, E).
    """

    def seam(earlier: Tensor, later: Tensor | None) -> Tensor:
        return fuse(earlier, later) if fused and later is not None else earlier

    parts, tail = [], before
    for number, velocity in enumerate(velocities):
        if tail is not None:
            parts.append(seam(tail, velocity[:, :overlap]))
        first = 0 if tail is None else overlap
        stop = velocity.shape[1]
        if number < len(velocities) - 1 or after is not None:
            stop -= overlap
        parts.append(velocity[:, first:stop])
        tail = velocity[:, stop:]
    if after is not None:
        assert tail is not None, "a chunk after the last one has a chunk before it"
        parts.append(seam(tail, after))
    return torch.cat(parts, 1)
