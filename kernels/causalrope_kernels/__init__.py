"""The operations between the matrix products of a causal video DiT. This package imports nothing of causalrope_sp."""

from causalrope_kernels.arguments import (
    Affine,
    ByFrame,
    Keys,
    Modulation,
    Norm,
    Pieces,
    Projection,
    RotateOnRead,
    Rotation,
    Slots,
    Source,
)
from causalrope_kernels.attention import ATTENTION_BACKENDS, attention, attention_obstacle, attention_parts, merge
from causalrope_kernels.operations import add_norm, linear_gelu, norm_rope_store, rms_norm, split_tokens
from causalrope_kernels.reference import Partial, project

__all__ = [
    "ATTENTION_BACKENDS",
    "Affine",
    "ByFrame",
    "Keys",
    "Modulation",
    "Norm",
    "Partial",
    "Pieces",
    "Projection",
    "RotateOnRead",
    "Rotation",
    "Slots",
    "Source",
    "add_norm",
    "attention",
    "attention_obstacle",
    "attention_parts",
    "linear_gelu",
    "merge",
    "norm_rope_store",
    "project",
    "rms_norm",
    "split_tokens",
]
