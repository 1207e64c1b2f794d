"""Attention by torch's fused kernels, with the log-sum-exp that they compute and the public function drops."""

from __future__ import annotations

import torch
from torch import Tensor

from causalrope_kernels import reference

_HALF = (torch.bfloat16, torch.float16)


def attention_lse(q_BTHD: Tensor, k_BLHD: Tensor, v_BLHD: Tensor) -> tuple[Tensor, Tensor]:
    """What `reference.attention_lse` gives, without the scores in memory wherever torch has a kernel for it."""
    q, k, v = (x.transpose(1, 2) for x in (q_BTHD, k_BLHD, v_BLHD))
    queries, keys, width = q.shape[2], k.shape[2], q.shape[3]
    if keys == 0 or queries == 0:
        return reference.attention_lse(q_BTHD, k_BLHD, v_BLHD)
    if q.device.type == "cpu":
        output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    elif q.dtype in _HALF and width % 8 == 0:
        output, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)
    elif q.dtype != torch.float64 and width % 8 == 0:
        output, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, True)
    else:
        return reference.attention_lse(q_BTHD, k_BLHD, v_BLHD)
    return output.transpose(1, 2), lse[..., :queries].transpose(1, 2)
