"""How a model is computed without gradients in all streams that share it."""

from __future__ import annotations

from typing import NamedTuple

from causalrope_kernels import PassOperations
from causalrope_sp.models.causal_dit import CausalDiT
from causalrope_sp.models.parts import SettledModel

MOST_PACKED = 1 << 26  # bytes of a model whose weights a stream on a CPU copies to a faster layout: 64 MiB


class SettledWeights(NamedTuple):
    """The operations of all passes but the first of a kind, and the model settled for them."""

    operations: PassOperations
    model: SettledModel


def settle(model: CausalDiT, backend: str) -> SettledWeights:
    """Settles how a model is computed without gradients. Streams of one model share the result, which on a CPU may hold
    a copy of its weights.

    Args:
        model: the DiT.
        backend: of attention.
    """
    packed = sum(parameter.nbytes for parameter in model.parameters()) <= MOST_PACKED
    operations = PassOperations.unchecked(model.patch_embedding.weight, backend, packed=packed)
    return SettledWeights(operations, model.settled(operations))
