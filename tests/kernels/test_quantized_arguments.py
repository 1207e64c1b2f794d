"""Wrong slots and pieces in 8 bits, and wrong offsets of keys, are refused by name."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from causalrope_kernels import Pieces, QuantizedPieces, Slots, norm_rope_store
from tests.kernels.test_arguments import kv_slots, projecting
from tests.support.kernel_inputs import B, D, F, H, S

INT8, FP8 = torch.int8, torch.float8_e4m3fn
NUMBERS, SCALES = torch.zeros(2, B, F, S, H, D, dtype=INT8), torch.zeros(2, B, F, S, H, dtype=torch.float16)
QUANTIZED, PLAIN = QuantizedPieces([], [NUMBERS], [SCALES]), Pieces([torch.zeros(2, B, F, S, H, D)])
OFFSET = torch.zeros(B, H, D)


def stored(dtype: torch.dtype = INT8, heads: int = H) -> list[Slots]:
    return [Slots(torch.zeros(B, F, S, heads, D, dtype=dtype), scales=torch.zeros(B, F, S, heads, dtype=torch.float16))]


def with_offset(offset: Tensor) -> None:
    norm_rope_store(projecting(), k=stored(), k_offset=offset)


WRONG: dict[str, tuple[Callable[[], object], str]] = {
    "fewer scales than numbers": (
        lambda: norm_rope_store(QuantizedPieces([], [NUMBERS] * 2, [SCALES])),
        r"q, numbers, scales: expected as many pieces of each, or none of q, not \(0, 2, 1\)",
    ),
    "fewer queries than numbers": (
        lambda: norm_rope_store(QuantizedPieces([NUMBERS[0].half()], [NUMBERS] * 2, [SCALES] * 2)),
        r"q, numbers, scales: expected as many pieces of each, or none of q, not \(1, 2, 2\)",
    ),
    "numbers of other heads": (
        lambda: norm_rope_store(QuantizedPieces([], [NUMBERS, NUMBERS[..., :1, :]], [SCALES, SCALES[..., :1]])),
        r"numbers\[1\]: expected shape \(2, B, F, s, H, d\), not \(2, 2, 3, 4, 1, 8\)",
    ),
    "keys alone": (
        lambda: norm_rope_store(QuantizedPieces([], [NUMBERS[:1]], [SCALES[:1]])),
        r"numbers\[0\]: expected shape \(2, B, F, s, H, d\), not \(1, ",
    ),
    "queries of other tokens": (
        lambda: norm_rope_store(QuantizedPieces([NUMBERS[0, :, :, 1:].half()], [NUMBERS], [SCALES])),
        r"q\[0\]: expected shape \(2, 3, 4, 3, 8\) as its numbers, not \(2, 3, 3, 3, 8\)",
    ),
    "slots of another dtype than the pieces": (
        lambda: norm_rope_store(QUANTIZED, k=stored(FP8)),
        r"k\[0\]: expected torch.int8 as the pieces, not torch.float8_e4m3fn",
    ),
    "plain slots for pieces in 8 bits": (
        lambda: norm_rope_store(QUANTIZED, v=kv_slots(B, F, S, H, D, dtype=torch.float16)),
        "v: expected scales and the same dtype in all Slots, not in some",
    ),
    "slots in 8 bits of two dtypes": (
        lambda: norm_rope_store(projecting(), k=stored(INT8, 1) + stored(FP8, 2)),
        "k: expected scales and the same dtype in all Slots, not in some",
    ),
    "slots in 8 bits for plain pieces": (
        lambda: norm_rope_store(PLAIN, k=stored()),
        "k: expected QuantizedPieces for Slots with scales, not Pieces",
    ),
    "queries in 8 bits": (
        lambda: norm_rope_store(projecting(), q=stored()),
        "q: expected Slots without scales, not quantized ones",
    ),
    "slots in 8 bits where a gradient is wanted": (
        lambda: norm_rope_store(projecting(q_weight=torch.zeros(H * D, requires_grad=True)), v=stored()),
        "k, v: expected Slots without scales where a gradient is required, not quantized ones",
    ),
    "an offset of other heads": (
        lambda: with_offset(OFFSET[:, 1:]),
        r"k_offset: expected floating-point numbers of shape \(2, 3, 8\) on cpu, not .* of shape \(2, 2, 8\)",
    ),
    "an offset of integers": (lambda: with_offset(OFFSET.int()), "k_offset: expected .* not torch.int32"),
    "an offset across memory": (
        lambda: with_offset(OFFSET.mT.contiguous().mT),
        r"k_offset: expected numbers without gaps, not strides \(24, 1, 3\)",
    ),
    "an offset of plain pieces": (
        lambda: norm_rope_store(PLAIN, k=kv_slots(B, F, S, H, D, dtype=torch.float32), k_offset=OFFSET),
        "k_offset: expected None for Pieces, which are copied, not an offset",
    ),
    "an offset of pieces in 8 bits": (
        lambda: norm_rope_store(QUANTIZED, k=stored(), k_offset=OFFSET),
        "k_offset: expected None for QuantizedPieces, which are copied, not an offset",
    ),
    "an offset of plain keys": (
        lambda: norm_rope_store(projecting(), k=kv_slots(B, F, S, H, D), k_offset=OFFSET),
        "k_offset: expected None unless k has Slots with scales, not an offset",
    ),
    "an offset without keys": (
        lambda: norm_rope_store(projecting(), v=stored(), k_offset=OFFSET),
        "k_offset: expected None unless k has Slots with scales, not an offset",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input_in_8_bits_is_refused_by_name(name: str) -> None:
    call, message = WRONG[name]
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
