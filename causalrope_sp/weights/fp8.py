"""Weights quantized to fp8: e4m3 numbers with a scale for every output channel.

A scale is a power of two, so that a number times its scale is the same in bfloat16 as in float64: precision is lost
only when the weights are quantized.

Shapes: N output channels, K input channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from causalrope_kernels.fp8_linear import fp8_obstacle
from causalrope_sp.errors import ConfigError
from causalrope_sp.models.causal_dit import CausalDiT
from causalrope_sp.models.fp8_linear import STORED, Fp8Linear

PARTS = ("numbers", "scale")  # what an `Fp8Linear` has in place of a weight
_LARGEST_EXPONENT = 8  # the largest e4m3 number is 448 = 1.75 · 2^8


def to_fp8(weight_NK: Tensor, computes_in: torch.dtype) -> tuple[Tensor, Tensor]:
    """Quantizes a weight to the nearest numbers, with a power of two as scale.

    The scale brings each row's largest number between 224 and 448, unless `computes_in` has no such scale: float16 has
    none below 2^-24, and a smaller one would turn the row into zeros.

    Args:
        weight_NK: a finite weight.
        computes_in: the dtype that the weight is dequantized to.

    Returns:
        The e4m3 numbers, (N, K), and the float32 scales, (N,).
    """
    wide = weight_NK.to(torch.promote_types(weight_NK.dtype, torch.float32))
    low, high = wide.aminmax(dim=1)
    largest = torch.maximum(-low, high)
    exponent = torch.frexp(largest / 1.75).exponent - _LARGEST_EXPONENT  # largest / scale is at most 448
    exponent = torch.where(largest.isfinite() & (largest > 0), exponent, 0)
    scale = torch.ldexp(torch.ones_like(largest), exponent.clamp(*_exponents(computes_in)))
    scaled = wide / scale.unsqueeze(1)
    if scaled.dtype == torch.float64:  # torch would round it to float32 first, and then once more
        step = torch.ldexp(torch.ones_like(scaled), torch.frexp(scaled).exponent.clamp(min=-5) - 4)
        scaled = (scaled / step).round() * step  # a multiple of e4m3's spacing; `round` takes the even one of two
    return scaled.to(STORED), scale.float()


def keep_fp8(stored: tuple[Tensor, Tensor] | None, pieces: Sequence[Tensor], computes_in: torch.dtype) -> bool:
    """Copies a matrix that is stored in fp8 as it is, which costs no rounding.

    Args:
        stored: its e4m3 numbers, (N, K), and the float32 scales of its rows, (N,); None if it is stored otherwise.
        pieces: where numbers and scales go.
        computes_in: the dtype that the weight is dequantized to.

    Returns:
        Whether it was copied: not if a scale, or a number once dequantized, has no finite value in `computes_in`.
    """
    if stored is None:
        return False
    numbers, scale = stored
    usable = scale.to(computes_in).isfinite() & (scale.to(computes_in) != 0)
    if not usable.all() or not largest_numbers(numbers, scale, computes_in).isfinite().all():
        return False
    for piece, made in zip(pieces, stored, strict=True):
        piece.copy_(made)
    return True


def largest_numbers(numbers_NK: Tensor, scale_N: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns the largest magnitude of each row once it is dequantized to `dtype`, (N,)."""
    largest = (numbers_NK.view(torch.uint8) & 127).amax(1)  # without its sign an e4m3 number is ordered as its bits are
    return largest.view(STORED).to(dtype) * scale_N.to(dtype)


def _exponents(dtype: torch.dtype) -> tuple[int, int]:
    """Returns the least and the greatest power of two that both float32 and `dtype` have; subnormal ones of float16
    count, because a product with them is exact or rounded once."""
    limits = torch.finfo(dtype)
    least, greatest = math.frexp(limits.tiny * limits.eps)[1] - 1, math.frexp(limits.max)[1] - 1
    return max(-126, least), min(127, greatest)


def quantized(model: CausalDiT) -> list[str]:
    """Returns the names of the parameters that `quantize_blocks` replaces: the weights of all Linears of the blocks."""
    modules = [f"blocks.{name}" for name, module in model.blocks.named_modules() if isinstance(module, nn.Linear)]
    return [f"{name}.weight" for name in modules]


def quantize_blocks(model: CausalDiT, dynamic: bool = False) -> None:
    """Replaces every Linear of the blocks, in place, by an `Fp8Linear` whose numbers are not filled yet.

    Embeddings, norms, modulation and head stay as they are.

    Args:
        model: the model.
        dynamic: of `Fp8Linear`.
    """
    for parameter in quantized(model):
        parent, _, leaf = parameter.removesuffix(".weight").rpartition(".")
        module = model.get_submodule(parent)
        setattr(module, leaf, Fp8Linear(getattr(module, leaf), dynamic))


def is_fp8(model: CausalDiT) -> bool:
    """Returns whether any weight of a model is stored in fp8."""
    return any(isinstance(module, Fp8Linear) for module in model.modules())


def check_dynamic(device: torch.device, dtype: torch.dtype) -> None:
    """Raises ConfigError unless products of fp8 numbers run on a device in a model's dtype."""
    if (needs := fp8_obstacle(device, dtype)) is not None:
        raise ConfigError(f"weights='fp8-dynamic' needs {needs}; weights='fp8' computes in the model's dtype")


def is_dynamic(model: CausalDiT) -> bool:
    """Returns whether any layer of a model computes with activations quantized to fp8."""
    return any(isinstance(module, Fp8Linear) and module.dynamic for module in model.modules())
