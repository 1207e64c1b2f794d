"""`PassOperations`: the operations of a forward, by backends that are chosen once instead of at every call.

A stream checks the arguments of its first pass of each kind and none of the later ones, which differ from it in numbers
alone: the host's work a layer is then little more than the launches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from torch import Tensor

from causalrope_kernels import inference, operations, reference
from causalrope_kernels.arguments import Keys, Norm, SlotsByHeads, Source
from causalrope_kernels.attention import attention as attend
from causalrope_kernels.attention import attention_by, attention_parts, choose, merge, parts_by
from causalrope_kernels.backend import use_triton
from causalrope_kernels.reference import Partial


class AddNorm(Protocol):
    """`operations.add_norm`."""

    def __call__(
        self, x_BTD: Tensor, y_BTD: Tensor | None, gate: Tensor | None, norm: Norm, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor]: ...


class RMSNorm(Protocol):
    """`operations.rms_norm`."""

    def __call__(self, x: Tensor, weight: Tensor, eps: float, out: Tensor | None = None) -> Tensor: ...


class Store(Protocol):
    """`operations.norm_rope_store`."""

    def __call__(
        self,
        source: Source,
        *,
        q: SlotsByHeads = (),
        k: SlotsByHeads = (),
        v: SlotsByHeads = (),
        k_offset: Tensor | None = None,
    ) -> None: ...


class SettledLinear(Protocol):
    """`inference.settled_linear`."""

    def __call__(self, weight: Tensor, bias: Tensor | None, gelu: bool = False) -> Callable[[Tensor], Tensor]: ...


class Attention(Protocol):
    """`attention.attention`."""

    def __call__(self, q_BTHD: Tensor, keys: Keys, *, reuse_q: bool = False) -> Tensor: ...


@dataclass(frozen=True)
class PassOperations:
    """The operations of a forward; each takes the arguments of the public function of its name but for the backend.

    A settled operation is made for one place of a model, such as a norm of a block, and keeps what does not change from
    call to call.

    Args:
        in_place: whether no gradient is computed, so that an operation may overwrite its input.
    """

    add_norm: AddNorm
    rms_norm: RMSNorm
    norm_rope_store: Store
    split_tokens: Callable[[Tensor, Sequence[Tensor]], None]
    linear: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    linear_gelu: Callable[[Tensor, Tensor, Tensor], Tensor]
    settled_linear: SettledLinear
    settled_add_norm: Callable[[], AddNorm]
    settled_rms_norm: Callable[[], RMSNorm]
    attention: Attention
    attention_parts: Callable[[Tensor, Keys], list[Partial]]
    merge: Callable[[Sequence[Partial]], Partial]
    in_place: bool

    @classmethod
    def checked(cls, attention: str = "auto", *, in_place: bool = False) -> PassOperations:
        """Returns the public functions, which check their arguments and choose a backend at every call.

        Args:
            attention: the attention backend, one of `ATTENTION_BACKENDS`.
            in_place: whether no gradient is computed.
        """
        return cls(
            operations.add_norm,
            operations.rms_norm,
            operations.norm_rope_store,
            operations.split_tokens,
            operations.linear,
            operations.linear_gelu,
            operations.settled_linear,
            lambda: operations.add_norm,
            lambda: operations.rms_norm,
            partial(attend, backend=attention),
            partial(attention_parts, backend=attention),
            merge,
            in_place,
        )

    @classmethod
    def unchecked(cls, like: Tensor, attention: str = "auto", *, packed: bool = False) -> PassOperations:
        """Returns operations without checks and gradients, by the backend for the device and dtype of a tensor.

        Args:
            like: a tensor of the pass, such as a weight of the model.
            attention: the attention backend, one of `ATTENTION_BACKENDS`.
            packed: whether a settled linear layer may keep a copy of its weight in a faster layout (on a CPU).
        """
        chosen: dict[tuple[object, ...], str] = {}

        def backend(q_BTHD: Tensor, keys: Keys) -> str:
            shapes = q_BTHD.shape, keys.k.shape, keys.k.dtype, keys.plain_rows
            found = chosen.get(shapes)
            if found is None:
                found = chosen[shapes] = choose(attention, q_BTHD, keys)
            return found

        def attended(q_BTHD: Tensor, keys: Keys, *, reuse_q: bool = False) -> Tensor:
            return attention_by(backend(q_BTHD, keys), q_BTHD, keys, reuse_q=reuse_q)

        def parts(q_BTHD: Tensor, keys: Keys) -> list[Partial]:
            return parts_by(backend(q_BTHD, keys), q_BTHD, keys)

        def merged(parts: Sequence[Partial]) -> Partial:
            return parts[0] if len(parts) == 1 else merge_several(parts)

        add_norm, rms_norm, store = inference.add_norm, inference.rms_norm, inference.norm_rope_store
        split, merge_several = reference.split_tokens, reference.merge
        settled_add_norm, settled_rms_norm = lambda: add_norm, lambda: rms_norm
        if use_triton("auto", like.detach()):
            from causalrope_kernels import add_norm_kernel, merge_kernel, norm_rope_store_launch, rms_norm_kernel

            add_norm, rms_norm, store = add_norm_kernel.add_norm, rms_norm_kernel.rms_norm, norm_rope_store_launch.store
            split, merge_several = norm_rope_store_launch.split_tokens, merge_kernel.merge
            settled_add_norm, settled_rms_norm = add_norm_kernel.settled_add_norm, rms_norm_kernel.settled_rms_norm
        return cls(
            add_norm,
            rms_norm,
            store,
            split,
            inference.linear,
            inference.linear_gelu,
            partial(inference.settled_linear, packed=packed),
            settled_add_norm,
            settled_rms_norm,
            attended,
            parts,
            merged,
            in_place=True,
        )
