"""The operations between the matrix products of a causal video DiT. Imports nothing of causalrope_sp."""

from causalrope_kernels.arguments import Affine, ByFrame, Keys, Modulation, Norm, Room, Rotation, Turn
from causalrope_kernels.attention import attention, attention_parts, merge
from causalrope_kernels.operations import add_norm, linear_gelu, rms_norm
from causalrope_kernels.reference import Partial
from causalrope_kernels.sources import Pieces, Projection, Source, split_tokens

__all__ = [
    "Affine",
    "ByFrame",
    "Keys",
    "Modulation",
    "Norm",
    "Partial",
    "Pieces",
    "Projection",
    "Room",
    "Rotation",
    "Source",
    "Turn",
    "add_norm",
    "attention",
    "attention_parts",
    "linear_gelu",
    "merge",
    "rms_norm",
    "split_tokens",
]
