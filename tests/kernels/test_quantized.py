"""Keys and values in int8 and fp8: torch's casts judge the numbers, float64 the attention, on Triton and on torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from causalrope_kernels import (
    Keys,
    Partial,
    Projection,
    QuantizedPieces,
    RotateOnRead,
    Slots,
    attention,
    attention_parts,
    merge,
    norm_rope_store,
    quantized_attention,
    reference,
)
from causalrope_kernels.backend import Backend
from causalrope_kernels.quantized_heads import LARGEST, dequantize, quantize
from causalrope_sp.attention.quantized_pieces import piece_shapes, slots_of, unpack
from causalrope_sp.grid import Shard
from causalrope_sp.models.rope import RotaryTables
from tests.kernels.test_triton_elementwise import SLOTS, a_projection
from tests.support.triton_cases import DEVICE, DTYPES, GRID, no_worse, random

pytestmark = pytest.mark.usefixtures("bfloat16_as_on_a_gpu")

STORED = pytest.mark.parametrize("stored", [torch.int8, torch.float8_e4m3fn], ids=["int8", "fp8"])
STEP = {torch.int8: 1 / 254, torch.float8_e4m3fn: 1 / 28}  # half a step at the largest number, over that number


@STORED
def test_the_largest_number_of_a_head_is_the_largest_of_the_dtype(stored: torch.dtype) -> None:
    x = random(5, 3, 20) * torch.tensor([0.02, 1.0, 300.0], dtype=torch.float64, device=DEVICE)[:, None]
    numbers, scales = quantize(x, stored)
    assert numbers.dtype == stored
    assert scales.dtype == torch.float16
    assert (numbers.float().abs().amax(-1) == LARGEST[stored]).all()
    error = (dequantize(numbers, scales, torch.float64) - x).abs().amax(-1)
    assert (error <= 1.02 * STEP[stored] * x.abs().amax(-1)).all()


@STORED
def test_zeros_and_extremes_stay_finite(stored: torch.dtype) -> None:
    x = torch.stack([torch.zeros(8), torch.full((8,), 1e-12), torch.full((8,), -3e38)]).to(DEVICE)
    numbers, scales = quantize(x, stored)
    found = dequantize(numbers, scales, torch.float32)
    assert torch.equal(found[:2], torch.zeros_like(found[:2]))
    assert (found[2] == -65504.0 * LARGEST[stored]).all()


def rings(
    source: Projection | QuantizedPieces,
    stored: torch.dtype,
    split: Sequence[int],
    name: Backend,
    offset: Tensor | None = None,
) -> list[tuple[Tensor, Tensor]]:
    """The numbers and scales of k and v, written by a backend to the slots of several rings; what is not written
    must stay as it was."""
    batch, _, tokens, _, width = source.shape
    found, k, v = [], list[Slots](), list[Slots]()
    for out in (k, v):
        rows = [batch * 7 * tokens * heads for heads in split]
        buffer = torch.full((sum(rows), width), 3, device=DEVICE).to(stored)
        all_scales = torch.full((sum(rows),), math.nan, dtype=torch.float16, device=DEVICE)
        for heads, ring, scales in zip(split, buffer.split(rows), all_scales.split(rows), strict=True):
            shape = batch, 7, tokens, heads
            out.append(Slots(ring.view(*shape, width), SLOTS, scales=scales.view(shape)))
    norm_rope_store(source, k=k, v=v, k_offset=offset, backend=name)
    for slots in (k, v):
        for each in slots:
            assert each.scales is not None
            assert each.scales[:, [1, 2, 4, 6]].isnan().all()
            assert (each.x[:, [1, 2, 4, 6]].float() == 3).all()
        written = [(each.x[:, SLOTS], each.scales[:, SLOTS]) for each in slots if each.scales is not None]
        found.append((torch.cat([x for x, _ in written], 3), torch.cat([x for _, x in written], 3)))
    return found


@STORED
@DTYPES
@pytest.mark.parametrize(("heads", "width", "split"), [(3, 20, (2, 1)), (2, 128, (2,))])
def test_projection(heads: int, width: int, split: Sequence[int], dtype: torch.dtype, stored: torch.dtype) -> None:
    """Numbers are those of the reference but for a few at the border of two, since norms and rotations are rounded."""
    given, exact = (a_projection(heads, width, 1, kind) for kind in (dtype, torch.float64))
    weights = given.q_weight.double(), given.k_weight.double()
    rounded = Projection(given.qkv_BFSN.double(), *weights, exact.rotation, heads, given.eps)
    offset = random(2, heads, width, seed=5).float()
    for shift in (None, offset):
        truth = rings(rounded, stored, split, "torch", shift)
        for name in ("triton", "torch"):
            for (numbers, scales), (right, right_scales) in zip(
                rings(given, stored, split, name, shift), truth, strict=True
            ):
                torch.testing.assert_close(scales, right_scales, rtol=2**-10, atol=0)
                differ = numbers.float() != right.float()
                assert differ.float().mean() < 2e-3
                found, expected = (
                    dequantize(*pair, torch.float64) for pair in ((numbers, scales), (right, right_scales))
                )
                assert ((found - expected).abs() <= 2.1 * STEP[stored] * expected.abs().amax(-1, keepdim=True)).all()


@pytest.mark.parametrize(
    ("stored", "dtype", "with_q"), [(torch.int8, torch.bfloat16, True), (torch.float8_e4m3fn, torch.float32, False)]
)
def test_what_was_sent_in_8_bits_is_what_is_stored(stored: torch.dtype, dtype: torch.dtype, with_q: bool) -> None:
    """Three ranks quantize their tokens into the pieces of a buffer; a fourth puts them into its rings."""
    heads, width, tokens = 3, 20, (7, 7, 6)
    projections = [a_projection(heads, width, rank, dtype) for rank in range(3)]
    offset, like = random(2, heads, width, seed=5).float(), random(1).to(dtype)
    sizes = [(2 + with_q, 2, 3, count, heads, width) for count in tokens]
    apart = [rings(source, stored, (2, 1), "triton", offset) for source in projections]
    shapes = piece_shapes(sizes, like)
    flat = torch.full((sum(count for (count,) in shapes),), math.nan, dtype=dtype, device=DEVICE)
    pieces = unpack(flat.split([count for (count,) in shapes]), sizes, stored)
    queries = [torch.empty(size[1:], dtype=dtype, device=DEVICE) for size in sizes]
    for number, source in enumerate(projections):
        q, k, v = ([slots[number]] if slots else [] for slots in slots_of(pieces))
        norm_rope_store(source, q=q, k=k, v=v, k_offset=offset, backend="triton")
        norm_rope_store(source, q=[Slots(queries[number])], backend="triton")
    for name in ("triton", "torch"):
        if with_q:
            q = [Slots(torch.empty(2, 2, 20, heads, width, dtype=dtype, device=DEVICE))]
            norm_rope_store(pieces.part(slice(1, 3)), q=q, backend=name)
            assert torch.equal(q[0].x, torch.cat(queries, 2)[:, 1:])
        found = rings(pieces, stored, (2, 1), name)
        for kind, (numbers, scales) in enumerate(found):
            assert torch.equal(numbers.view(torch.uint8), torch.cat([x[kind][0] for x in apart], 2).view(torch.uint8))
            assert torch.equal(scales, torch.cat([x[kind][1] for x in apart], 2))


def quantized_keys(k: Tensor, v: Tensor, stored: torch.dtype, **how: object) -> tuple[Keys, Keys]:
    """Keys with scales, and the same dequantized to float64."""
    (k_numbers, k_scales), (v_numbers, v_scales) = quantize(k, stored), quantize(v, stored)
    keys = Keys(k_numbers, v_numbers, k_scales=k_scales, v_scales=v_scales)
    wide = Keys(dequantize(k_numbers, k_scales, torch.float64), dequantize(v_numbers, v_scales, torch.float64))
    return replace(keys, **how), replace(wide, **how)  # type: ignore[arg-type]


def whole(q: Tensor, keys: Keys, backend: str) -> Partial:
    return merge(attention_parts(q, keys, backend), backend="torch")


def check_attention(q: Tensor, keys: Keys, wide: Keys, dtype: torch.dtype) -> None:
    """Triton and torch in a dtype, against attention on the dequantized keys in float64."""
    given = q.to(dtype)
    truth = whole(given.double(), wide, "torch")
    rough = merge(attention_parts(given, replace(wide, k=wide.k.to(dtype), v=wide.v.to(dtype)), "torch"))
    for name in ("triton", "torch"):
        for ours, other, exact in zip(whole(given, keys, name), rough, truth, strict=True):
            no_worse(ours, other.to(ours.dtype), exact)


@STORED
@DTYPES
@pytest.mark.parametrize(("queries", "keys", "width"), [(1, 1, 20), (5, 70, 64), (3, 20, 160)])
def test_attention(
    queries: int, keys: int, width: int, dtype: torch.dtype, stored: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantized_attention, "BLOCK", 27)
    q, (k, v) = random(1, queries, 3, width), random(2, 1, keys, 3, width, seed=1)
    found, wide = quantized_keys(k, v, stored)
    check_attention(q[:, :, 1:], found.heads(slice(1, 3)), wide.heads(slice(1, 3)), dtype)


@STORED
@DTYPES
def test_attention_over_ranges_of_a_ring(stored: torch.dtype, dtype: torch.dtype) -> None:
    q, (k, v) = random(2, 11, 3, 20), random(2, 2, 150, 3, 20, seed=1)
    ranges = ((3, 90), (95, 95), (100, 149))
    bounds = torch.tensor(ranges, dtype=torch.int32, device=DEVICE)
    check_attention(q, *quantized_keys(k, v, stored, ranges=ranges, bounds_N2=bounds), dtype)


@STORED
@DTYPES
def test_heads_that_read_rows_of_their_own(stored: torch.dtype, dtype: torch.dtype) -> None:
    q, (k, v) = random(2, 11, 3, 20), random(2, 2, 150, 3, 20, seed=1)
    rows = ((3, 90), (95, 95)), ((100, 149), (0, 1)), ((7, 7), (0, 150))
    bounds = torch.tensor(rows, dtype=torch.int32, device=DEVICE)
    check_attention(q, *quantized_keys(k, v, stored, head_ranges=rows, bounds_N2=bounds), dtype)


@STORED
@DTYPES
@pytest.mark.parametrize("width", [20, 128])
def test_rotation_on_read(stored: torch.dtype, width: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of torch begin and end within slots."""
    monkeypatch.setattr(quantized_attention, "BLOCK", 17)
    slots, tokens = 6, 13
    q, (k, v) = random(1, 5, 2, width), random(2, 1, slots * tokens, 2, width, seed=1)
    rotate_on_read = RotaryTables(width, 10_000, Shard(GRID), DEVICE, torch.float64).rotate_on_read(
        [3, 0, 1, 2, 5, 4], tokens
    )
    table = RotateOnRead(rotate_on_read.table.to(torch.float32), tokens)
    rows = ((0, 2 * tokens), (3 * tokens, 5 * tokens))
    for read in ({"ranges": rows}, {"head_ranges": (rows, ((tokens, tokens), (4 * tokens, 5 * tokens)))}):
        found, wide = quantized_keys(k, v, stored, rotate_on_read=rotate_on_read, **read)
        check_attention(q, replace(found, rotate_on_read=table), wide, dtype)


class Largest(TorchDispatchMode):
    """Finds the largest tensor that an operation returns, in numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        own = [x for x in tree_leaves(result) if isinstance(x, Tensor) and x._base is None]
        self.numel = max([self.numel, *(x.numel() for x in own)])
        return result


@STORED
def test_no_whole_copy_of_the_keys_is_made(stored: torch.dtype) -> None:
    """Torch's biggest tensor is a block of them in float32."""
    q, (k, v) = random(1, 5, 2, 16).bfloat16(), random(2, 1, 5000, 2, 16, seed=1)
    keys, _ = quantized_keys(k, v, stored)
    with Largest() as largest:
        attention(q, keys, "torch")
    assert largest.numel <= quantized_attention.BLOCK * 2 * 16


def test_softmax_does_not_see_an_offset_of_all_keys() -> None:
    q, (k, v), offset = random(1, 5, 2, 16), random(2, 1, 60, 2, 16, seed=1), random(1, 1, 2, 16, seed=2)
    shifted, _ = merge(attention_parts(q, Keys(k - offset, v), "torch"))
    torch.testing.assert_close(shifted, reference.attention(q, k, v), rtol=1e-12, atol=1e-12)


def test_a_window_without_keys_is_zeros_and_minus_infinity() -> None:
    q, (k, v) = random(1, 5, 2, 16).float(), random(2, 1, 60, 2, 16, seed=1)
    keys, _ = quantized_keys(k, v, torch.int8, ranges=((7, 7),))
    for name in ("torch", "triton"):
        output, lse = whole(q, keys, name)
        assert not output.any()
        assert (lse == -math.inf).all()


REFUSED = [
    (lambda keys: replace(keys, v_scales=None), "expected both"),
    (lambda keys: replace(keys, k=keys.k.float()), "one dtype"),
    (lambda keys: replace(keys, k_scales=keys.k_scales.float()), "torch.float16"),
    (lambda keys: replace(keys, k_scales=keys.k_scales[:, :5]), r"k scales: expected torch.float16 of shape \(1, 60"),
    (lambda keys: replace(keys, k_scales=keys.k_scales.mT.contiguous().mT), "strides of the numbers"),
    (lambda keys: replace(keys, k=keys.k.int(), v=keys.v.int()), "int8 or float8_e4m3fn"),
]


@pytest.mark.parametrize(("change", "sentence"), REFUSED, ids=[sentence for _, sentence in REFUSED])
def test_keys_that_do_not_fit_are_refused(change, sentence: str) -> None:  # type: ignore[no-untyped-def]
    q, (k, v) = random(1, 5, 2, 16).float(), random(2, 1, 60, 2, 16, seed=1)
    keys, _ = quantized_keys(k, v, torch.int8)
    with pytest.raises(ValueError, match=sentence):
        attention(q, change(keys))
    with pytest.raises(ValueError, match=r"flash attends keys in the dtype of the queries, not in torch\.int8"):
        attention(q, keys, "flash")
    with pytest.raises(ValueError, match="no gradient"):
        attention(q.requires_grad_(), keys)
