"""The operations between the matrix products of a causal video DiT. Imports nothing of causalrope_sp."""

from causalrope_kernels.attention import attention_lse
from causalrope_kernels.reference import (
    Placement,
    Projection,
    attention,
    gate_add,
    merge,
    modulate,
    rms_norm,
    rotate,
)

__all__ = [
    "Placement",
    "Projection",
    "attention",
    "attention_lse",
    "gate_add",
    "merge",
    "modulate",
    "rms_norm",
    "rotate",
]
