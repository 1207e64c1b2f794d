"""The change of a weight that an adapter's tensors stand for.

LoRA (arXiv 2106.09685), LoHa (arXiv 2108.06098) and LoKr (LyCORIS, arXiv 2309.14859), and over any of them the
magnitudes of DoRA (arXiv 2402.09353).

Shapes: N outputs, K inputs, k... the axes of a convolution's kernel, r the rank.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

_LORA = {"down", "up"}
_LOHA = {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}
_KINDS = {"LoRA": ("down", "up", "mid"), "LoHa": ("hada_",), "LoKr": ("lokr_",)}


def factors_of(roles: Collection[str]) -> list[str]:
    """Returns the roles that `product` takes."""
    return [role for role in roles if _kind_of_role(role)]


def kind_of(roles: Collection[str]) -> str | None:
    """Returns the kind of a low-rank change, "LoRA", "LoHa" or "LoKr", by its roles; None if there is none."""
    return next((kind for role in roles if (kind := _kind_of_role(role))), None)


def lacking(roles: Collection[str]) -> str | None:
    """Returns what a low-rank change must have and has not, as text; None if it has all that it needs."""
    kinds = {kind for role in roles if (kind := _kind_of_role(role))}
    if len(kinds) > 1:
        return "one kind of factors"
    if kinds == {"LoRA"}:
        return None if {*roles} >= _LORA else "down and up"
    if kinds == {"LoHa"}:
        tuckers = {"hada_t1", "hada_t2"} & {*roles}
        return None if {*roles} >= _LOHA and len(tuckers) != 1 else f"{', '.join(sorted(_LOHA))}, and both t or none"
    if kinds == {"LoKr"}:
        has = [f"lokr_{w}" in roles or {f"lokr_{w}_a", f"lokr_{w}_b"} <= {*roles} for w in ("w1", "w2")]
        return None if all(has) else "lokr_w1 and lokr_w2, each whole or as _a and _b"
    return None


def rank_of(shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    """Returns the rank of a low-rank change by the shapes of its tensors; None for a LoKr of two whole factors."""
    role = next((r for r in ("down", "hada_w1_b", "lokr_w2_b", "lokr_w1_b") if r in shapes), None)
    return shapes[role][0] if role is not None and shapes[role] else None


def product(factors: Mapping[str, Tensor]) -> Tensor:
    """Returns the product of a change's factors, without its scale.

    Args:
        factors: role -> tensor, with all that the kind needs.

    Returns:
        The product, (N, ...), whose other axes flattened are those of the weight.

    Raises:
        RuntimeError, IndexError, ValueError: the shapes do not fit each other.
    """
    kind = kind_of(factors)
    if kind == "LoHa":
        return _hadamard_half(factors, 1) * _hadamard_half(factors, 2)
    if kind == "LoKr":
        first, second = _kronecker_factor(factors, "w1"), _kronecker_factor(factors, "w2")
        return torch.kron(first.reshape(*first.shape, *(1 for _ in second.shape[2:])), second.contiguous())
    down, up = factors["down"].flatten(1), factors["up"].flatten(1)
    if "mid" in factors:  # of a convolution whose kernel is factored too
        return torch.einsum("mn...,om,ni->oi...", factors["mid"], up, down)
    return up @ down


def with_magnitudes(weight_NK: Tensor, magnitudes: Tensor) -> Tensor:
    """Returns DoRA's weight: each row, or each column, has the given norm.

    Args:
        weight_NK: the weight with the low-rank change added.
        magnitudes: (N, 1) for the norms of rows, (1, K) for those of columns.
    """
    return weight_NK * (magnitudes / weight_NK.norm(dim=1 if len(magnitudes) == len(weight_NK) else 0, keepdim=True))


def _kind_of_role(role: str) -> str | None:
    """The kind of low-rank change that a role belongs to; None for alpha, biases, magnitudes and differences."""
    return next((kind for kind, starts in _KINDS.items() if role.startswith(starts)), None)


def _hadamard_half(factors: Mapping[str, Tensor], number: int) -> Tensor:
    """One of the two low-rank matrices whose elementwise product is a LoHa."""
    a, b = factors[f"hada_w{number}_a"], factors[f"hada_w{number}_b"]
    tucker = factors.get(f"hada_t{number}")
    return a @ b if tucker is None else torch.einsum("ij...,ip,jr->pr...", tucker, a, b)


def _kronecker_factor(factors: Mapping[str, Tensor], name: str) -> Tensor:
    """One of the two matrices whose Kronecker product is a LoKr."""
    if f"lokr_{name}" in factors:
        return factors[f"lokr_{name}"]
    a, b = factors[f"lokr_{name}_a"], factors[f"lokr_{name}_b"]
    if name == "w2" and "lokr_t2" in factors:
        return torch.einsum("ij...,ip,jr->pr...", factors["lokr_t2"], a, b)
    return (a @ b.flatten(1)).unflatten(1, b.shape[1:])
