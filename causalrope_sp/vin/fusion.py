"""What neighbouring chunks say of the frames that they share, made one. Pure functions.

Shapes: B batch, F frames, F_o of the overlap, s tokens of a frame, E numbers in a token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def fuse(earlier_BFSE: Tensor, later_BFSE: Tensor) -> Tensor:
    """((F_o - W(k))·ε_i[k] + W(k)·ε_{i+1}[k]) / F_o over the frames k of an overlap, from chunk i to chunk i + 1.

    W(k) = k + 1/2, the place of the frame's middle, so that both chunks are treated alike: read backwards in time the
    weights are the same, and an overlap of one frame is the mean of the two. (The paper says no more than "the frame's
    place"; counted from 0 or from 1, one chunk would weigh more.)
    """
    frames = earlier_BFSE.shape[1]
    place = (torch.arange(frames, dtype=earlier_BFSE.dtype, device=earlier_BFSE.device) + 0.5).view(-1, 1, 1)
    return ((frames - place) * earlier_BFSE + place * later_BFSE) / frames


def join(
    velocities: Sequence[Tensor],
    overlap: int,
    *,
    fused: bool,
    before: Tensor | None = None,
    after: Tensor | None = None,
) -> Tensor:
    """The velocity of all frames that some neighbouring chunks cover, (B, F, s, E), each frame once.

    Args:
        velocities: chunk by chunk, (B, F, s, E).
        overlap: how many frames neighbours share.
        fused: fuse what is shared; otherwise the earlier chunk, which owns it, has it alone.
        before: what the chunk before the first says of the frames that they share; None if there is none.
        after: the same of the chunk after the last; None if there is none, or nothing is fused.
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
        assert tail is not None, "a chunk after others"
        parts.append(seam(tail, after))
    return torch.cat(parts, 1)
