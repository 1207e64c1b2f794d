"""How much of each latent pixel each object of a scene covers.

Shapes: F latent frames, O = 2 objects, X latent width and height.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from causalrope_sp.toybox.prompts import SceneSpec
from causalrope_sp.toybox.scenes import START_VARIABLES, coverage

OBJECTS = START_VARIABLES // 3
PIXELS = 4  # of the width and height of a latent pixel, when its coverage is computed


def coverage_of(scene: SceneSpec, starts: Sequence[float], pixel_frames: int, latent_size: int) -> Tensor:
    """Computes how much of each latent pixel each object covers and shows.

    Args:
        scene: the scene.
        starts: its six uniform numbers.
        pixel_frames: 1 + 4n.
        latent_size: X.

    Returns:
        Shares from 0 to 1, half precision, (F, O, X, X); 0 for a second object that does not exist.
    """
    shown_OTXX = torch.zeros(OBJECTS, pixel_frames, PIXELS * latent_size, PIXELS * latent_size)
    for number, cover_TXX in enumerate(coverage(scene, starts, torch.arange(pixel_frames), shown_OTXX.shape[-1])):
        shown_OTXX[:number] *= 1 - cover_TXX  # it is in front of those before
        shown_OTXX[number] = cover_TXX
    pixels = functional.avg_pool2d(shown_OTXX, PIXELS)
    later = pixels[:, 1:].unflatten(1, (-1, 4)).mean(2)  # a latent frame after the first is four pixel frames
    return torch.cat([pixels[:, :1], later], 1).transpose(0, 1).half()
