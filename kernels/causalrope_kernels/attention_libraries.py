"""Attention kernels of other libraries behind one call: (q, k, v) to the output and its log-sum-exp.

A library is imported at its first use. All but `sage` are exact to the rounding of the dtype; sage computes in 8 bits,
so it runs only if it is named.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from causalrope_kernels.reference import Partial, attention_lse

Run = Callable[[Tensor, Tensor, Tensor], Partial]
_HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Library:
    """An attention library and its limits.

    Args:
        run: takes q, (B, T, H, d), and k and v, (B, L, H, d), with T and L at least 1. It returns the output,
            (B, T, H, d), and its log-sum-exp, (B, T, H).
        module: the module that must be installed; None for a kernel of torch.
        dtypes: the dtypes that it computes in.
        widest: the largest head width. Every library needs a head width that 8 divides.
        capability: the lowest and the highest major CUDA compute capability that it runs on.
        exact: whether its error is no more than the rounding of the dtype.
    """

    run: Run
    module: str | None = None
    dtypes: tuple[torch.dtype, ...] = _HALF
    widest: int = 256
    capability: tuple[int, int] = (8, 99)
    exact: bool = True

    def obstacle(self, q_BTHD: Tensor) -> str | None:
        """Returns why the library cannot attend with these queries, as a phrase that follows its name, or None."""
        if self.module is not None and not is_installed(self.module):
            return f"is not installed: it needs the module {self.module}"
        if not q_BTHD.is_cuda:
            return f"runs on cuda, not on {q_BTHD.device}"
        if q_BTHD.dtype not in self.dtypes:
            return f"runs in {', '.join(str(d).removeprefix('torch.') for d in self.dtypes)}, not in {q_BTHD.dtype}"
        if q_BTHD.shape[-1] % 8 or q_BTHD.shape[-1] > self.widest:
            return f"takes head widths that 8 divides, up to {self.widest}, not {q_BTHD.shape[-1]}"
        major, _ = torch.cuda.get_device_capability(q_BTHD.device)
        if not self.capability[0] <= major <= self.capability[1]:
            return f"runs on compute capability {self.capability[0]} to {self.capability[1]}, not {major}"
        return None


@cache
def is_installed(module: str) -> bool:
    """Whether a module can be imported. One that fails, such as a build for another torch, counts as absent."""
    try:
        return find_spec(module) is not None
    except ImportError:
        return False


def _heads_first(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v as (B, H, T, d), the layout of torch's kernels."""
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def _flash(q: Tensor, k: Tensor, v: Tensor) -> Partial:
    output, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(*_heads_first(q, k, v))
    return output.transpose(1, 2), lse[..., : q.shape[1]].transpose(1, 2)


def _efficient(q: Tensor, k: Tensor, v: Tensor) -> Partial:
    output, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(*_heads_first(q, k, v), None, True)
    return output.transpose(1, 2), lse[..., : q.shape[1]].transpose(1, 2)


def _cudnn(q: Tensor, k: Tensor, v: Tensor) -> Partial:
    output, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(*_heads_first(q, k, v), None, True)
    batch, tokens, heads, _ = q.shape
    return output.transpose(1, 2), lse.reshape(batch, heads, tokens).transpose(1, 2)


def _flash_attn_2(q: Tensor, k: Tensor, v: Tensor) -> Partial:
    from flash_attn import flash_attn_func

    output, lse, _ = flash_attn_func(q, k, v, return_attn_probs=True)
    return output, lse.transpose(1, 2)


def _flash_attn_3(q: Tensor, k: Tensor, v: Tensor) -> Partial:
    from flash_attn_interface import flash_attn_func

    try:
        output, lse, *_ = flash_attn_func(q, k, v, return_attn_probs=True)
    except TypeError:  # older releases lack the option and always return both
        output, lse, *_ = flash_attn_func(q, k, v)
    return output, lse.transpose(1, 2)


def _flash_attn_4(q: Tensor, k: Tensor, v: Tensor) -> Partial:
    from flash_attn.cute import flash_attn_func

    try:
        output, lse, *_ = flash_attn_func(q, k, v, return_lse=True)
    except TypeError:  # older releases lack the option and always return both
        output, lse, *_ = flash_attn_func(q, k, v)
    return output, lse.transpose(1, 2)


def _sage(q: Tensor, k: Tensor, v: Tensor) -> Partial:
    from sageattention import sageattn

    output, lse = sageattn(q, k, v, tensor_layout="NHD", return_lse=True)
    return output, lse.transpose(1, 2)


LIBRARIES = {
    "cudnn": Library(_cudnn, widest=128),
    "flash": Library(_flash),
    "efficient": Library(_efficient, dtypes=(torch.float32, *_HALF), capability=(5, 99)),
    "flash-attn-2": Library(_flash_attn_2, "flash_attn.flash_attn_interface"),
    "flash-attn-3": Library(_flash_attn_3, "flash_attn_interface", capability=(9, 9)),
    "flash-attn-4": Library(_flash_attn_4, "flash_attn.cute", widest=128, capability=(9, 11)),
    "sage": Library(_sage, "sageattention", widest=128, exact=False),
}


def by_torch(q_BTHD: Tensor, k_BLHD: Tensor, v_BLHD: Tensor) -> Partial:
    """Torch's attention with the log-sum-exp, which its kernels compute and its public function drops."""
    if q_BTHD.device.type == "cpu":
        q, k, v = _heads_first(q_BTHD, k_BLHD, v_BLHD)
        output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
        return output.transpose(1, 2), lse.transpose(1, 2)
    for name in ("flash", "efficient"):
        if LIBRARIES[name].obstacle(q_BTHD) is None:
            return LIBRARIES[name].run(q_BTHD, k_BLHD, v_BLHD)
    return attention_lse(q_BTHD, k_BLHD, v_BLHD)
