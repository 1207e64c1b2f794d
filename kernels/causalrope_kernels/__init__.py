"""The operations between the matrix products of a causal video DiT. Imports nothing of causalrope_sp."""

from causalrope_kernels.reference import (
    attention,
    attention_lse,
    gate_add,
    merge,
    modulate,
    qk_norm_rotate,
    rms_norm,
    rotate,
)

__all__ = [
    "attention",
    "attention_lse",
    "gate_add",
    "merge",
    "modulate",
    "qk_norm_rotate",
    "rms_norm",
    "rotate",
]
