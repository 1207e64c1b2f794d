"""Convolution in time by Winograd's minimal filtering, for CPUs: fewer 2-dimensional convolutions for the same output.

A convolution over 3 frames makes each output frame of 3 two-dimensional convolutions. F(m, 3) (Winograd 1980; Lavin
and Gray, arXiv 1509.09308) makes m output frames of m + 2: it reads m + 2 frames as the values of a polynomial, mixes
them into its values at m + 2 points, convolves each with weights that are mixed alike, and mixes the results into m
frames:

    y = Aᵀ [(G g) ⊙ (Bᵀ d)]     d: m + 2 frames, g: 3 taps, y: m frames

With m = 4 these are 6 convolutions in place of 12, with m = 2 they are 4 in place of 6. In exact arithmetic the result
is the same. In float32 the error of a layer is 2.3 times that of a direct convolution with m = 4, and 1.1 times with
m = 2.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

# Points of a small error in float32. The point 1 mixes all output frames alike, so that its convolution adds the bias.
_POINTS = {2: (0.0, 1.0, -1.0), 4: (0.0, 1.0, -1.0, 0.5, -2.0)}
BIASED = 1  # which of the convolutions is that of the point 1


def block_of(frames: int) -> int:
    """Returns how many output frames m are made together, of `frames` that belong together."""
    return next(m for m in (4, 2, 1) if frames % m == 0)


@cache
def transforms(m: int) -> tuple[Tensor, Tensor, Tensor]:
    """Computes Bᵀ (m+2, m+2), G (m+2, 3) and Aᵀ (m, m+2) in float64 for m of 2 or 4.

    The last point is infinity. Rows of Bᵀ have length 1, for which those of G make up; Aᵀ has ones at the point 1.
    """
    points = torch.tensor(_POINTS[m], dtype=torch.float64)
    n = m + 2
    a, g = points[:, None] ** torch.arange(m), points[:, None] ** torch.arange(3)
    a = torch.cat([a, torch.eye(m, dtype=torch.float64)[-1:]])
    g = torch.cat([g, torch.eye(3, dtype=torch.float64)[-1:]])
    # Σ_i a[i, k] g[i, j] bt[i, l] = 1 where l = k + j, else 0: what makes y_k = Σ_j g_j d_{k+j}
    left = torch.einsum("ik,ij->kji", a, g).flatten(0, 1)
    right = torch.zeros(m, 3, n, dtype=torch.float64)
    for k in range(m):
        right[k, torch.arange(3), torch.arange(k, k + 3)] = 1
    bt = torch.linalg.lstsq(left, right.flatten(0, 1)).solution
    length = bt.norm(dim=1, keepdim=True)
    return bt / length, g * length, a.T.contiguous()


def mixed_weights(weight_OC3HW: Tensor, m: int) -> Tensor:
    """Mixes the taps of a convolution into those of the points, (m+2, O, C, kh, kw), each in channels-last order."""
    mixed = torch.einsum("nk,ockhw->nohwc", transforms(m)[1], weight_OC3HW.double())
    return mixed.to(weight_OC3HW.dtype).contiguous().permute(0, 1, 4, 2, 3)
