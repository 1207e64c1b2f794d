"""Checks of quantized keys, values and slots, beside those of `check`."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from causalrope_kernels.arguments import Keys, Slots
from causalrope_kernels.backend import needs_gradient
from causalrope_kernels.quantized_heads import LARGEST, SCALE_DTYPE


def scales(label: str, numbers: Tensor, found: Tensor, like: Tensor) -> None:
    """Checks numbers in 8 bits, (…, d), and their scales, (…), which lie in memory as the numbers do."""
    if numbers.dtype not in LARGEST or numbers.device != like.device:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in LARGEST)
        raise ValueError(
            f"{label}: expected numbers with scales in {names} on {like.device}, not {numbers.dtype} on "
            f"{numbers.device}"
        )
    if found.shape != numbers.shape[:-1] or found.dtype != SCALE_DTYPE or found.device != like.device:
        raise ValueError(
            f"{label} scales: expected {SCALE_DTYPE} of shape {tuple(numbers.shape[:-1])} on {like.device}, not "
            f"{found.dtype} of shape {tuple(found.shape)} on {found.device}"
        )
    width = numbers.shape[-1]
    steps = zip(found.shape, found.stride(), numbers.stride(), strict=False)
    if any(size > 1 and step * width != of_numbers for size, step, of_numbers in steps):
        raise ValueError(
            f"{label} scales: expected the strides of the numbers {numbers.stride()[:-1]} divided by {width}, not "
            f"{found.stride()}"
        )


def slots(name: str, given: Sequence[Slots], like: Tensor) -> None:
    """Checks all slots of keys, or of values, that are quantized."""
    if any(each.scales is None for each in given) or len({each.x.dtype for each in given}) > 1:
        raise ValueError(f"{name}: expected scales and the same dtype in all Slots, not in some")
    first = given[0]
    for number, each in enumerate(given):
        label = f"{name}[{number}]"
        assert each.scales is not None, "checked above"
        scales(label, each.x, each.scales, like)
        if (each.offset is None) != (first.offset is None):
            raise ValueError(f"{name}: expected an offset in all Slots or in none, not in some")
        if each.offset is not None:
            offset(label, each.offset, each.x, like)


def offset(label: str, found: Tensor, numbers: Tensor, like: Tensor) -> None:
    """Checks what is subtracted from heads before they are quantized."""
    batch, _, _, heads, width = numbers.shape
    if found.shape != (batch, heads, width) or not found.is_floating_point() or found.device != like.device:
        raise ValueError(
            f"{label} offset: expected floating-point numbers of shape {(batch, heads, width)} on {like.device}, not "
            f"{found.dtype} of shape {tuple(found.shape)} on {found.device}"
        )
    if width > 1 and found.stride(2) != 1:
        raise ValueError(f"{label} offset: expected stride 1 in its last axis, not {found.stride(2)}")


def no_gradient(*kinds: Sequence[Slots]) -> None:
    """Refuses slots that are quantized, since rounding has no gradient."""
    if any(each.scales is not None for given in kinds for each in given):
        raise ValueError("k, v: expected Slots without scales where a gradient is required, not quantized ones")


def keys(given: Keys, q_BTHD: Tensor) -> None:
    """Checks quantized keys and values."""
    if given.k_scales is None or given.v_scales is None or given.k.dtype != given.v.dtype:
        raise ValueError("k_scales, v_scales: expected both, for keys and values of one dtype, not one")
    if needs_gradient(q_BTHD):
        raise ValueError("q: expected no gradient to be required of attention on quantized keys, not one")
    scales("k", given.k, given.k_scales, q_BTHD)
    scales("v", given.v, given.v_scales, q_BTHD)
