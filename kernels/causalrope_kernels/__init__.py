"""The operations between the matrix products of a causal video DiT. This package imports nothing of causalrope_sp."""

from causalrope_kernels.arguments import (
    Affine,
    Keys,
    Modulation,
    Norm,
    Pieces,
    Projection,
    QuantizedPieces,
    RotateOnRead,
    Slots,
    Source,
)
from causalrope_kernels.attention import ATTENTION_BACKENDS, attention, attention_obstacle, attention_parts, merge
from causalrope_kernels.bands import Bands
from causalrope_kernels.operations import add_norm, linear, linear_gelu, norm_rope_store, rms_norm, split_tokens
from causalrope_kernels.pass_operations import PassOperations
from causalrope_kernels.reference import Partial, project
from causalrope_kernels.rotation import Rotation

__all__ = [
    "ATTENTION_BACKENDS",
    "Affine",
    "Bands",
    "Keys",
    "Modulation",
    "Norm",
    "Partial",
    "PassOperations",
    "Pieces",
    "Projection",
    "QuantizedPieces",
    "RotateOnRead",
    "Rotation",
    "Slots",
    "Source",
    "add_norm",
    "attention",
    "attention_obstacle",
    "attention_parts",
    "linear",
    "linear_gelu",
    "merge",
    "norm_rope_store",
    "project",
    "rms_norm",
    "split_tokens",
]
