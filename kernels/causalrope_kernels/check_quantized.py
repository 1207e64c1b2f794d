"""Checks of quantized keys, values and slots, beside those of `check`."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from causalrope_kernels.arguments import Keys, Projection, QuantizedPieces, Slots, Source
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


def slots(name: str, given: Sequence[Slots], source: Source) -> None:
    """Checks all slots of keys, or of values, that are quantized."""
    if any(each.scales is None for each in given) or len({each.x.dtype for each in given}) > 1:
        raise ValueError(f"{name}: expected scales and the same dtype in all Slots, not in some")
    for number, each in enumerate(given):
        assert each.scales is not None, "checked above"
        scales(f"{name}[{number}]", each.x, each.scales, source.like)
        if isinstance(source, QuantizedPieces) and each.x.dtype != source.numbers[0].dtype:
            raise ValueError(f"{name}[{number}]: expected {source.numbers[0].dtype} as the pieces, not {each.x.dtype}")


def offset(found: Tensor | None, source: Source, k: Sequence[Slots]) -> None:
    """Checks what is subtracted from the keys of a projection before they are quantized."""
    if found is None:
        return
    if not isinstance(source, Projection):
        raise ValueError(f"k_offset: expected None for {type(source).__name__}, which are copied, not an offset")
    if not k or k[0].scales is None:
        raise ValueError("k_offset: expected None unless k has Slots with scales, not an offset")
    batch, _, _, heads, width = source.shape
    device = source.like.device
    if found.shape != (batch, heads, width) or not found.is_floating_point() or found.device != device:
        raise ValueError(
            f"k_offset: expected floating-point numbers of shape {(batch, heads, width)} on {device}, not "
            f"{found.dtype} of shape {tuple(found.shape)} on {found.device}"
        )
    if not found.is_contiguous():
        raise ValueError(f"k_offset: expected numbers without gaps, not strides {found.stride()}")


def pieces(source: QuantizedPieces) -> None:
    """Checks pieces of keys and values that were quantized before."""
    if not source.numbers or len(source.numbers) != len(source.scales) or len(source.q) not in (0, len(source.numbers)):
        counts = len(source.q), len(source.numbers), len(source.scales)
        raise ValueError(f"q, numbers, scales: expected as many pieces of each, or none of q, not {counts}")
    shape = source.numbers[0].shape
    for number, (own, own_scales) in enumerate(zip(source.numbers, source.scales, strict=True)):
        if own.ndim != 6 or len(own) != 2 or (*own.shape[1:3], *own.shape[4:]) != (*shape[1:3], *shape[4:]):
            raise ValueError(f"numbers[{number}]: expected shape (2, B, F, s, H, d), not {tuple(own.shape)}")
        scales(f"numbers[{number}]", own, own_scales, source.like)
    for number, (q, own) in enumerate(zip(source.q, source.numbers, strict=False)):
        if q.shape != own.shape[1:]:
            raise ValueError(f"q[{number}]: expected shape {tuple(own.shape[1:])} as its numbers, not {tuple(q.shape)}")


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
