"""Every torch reference against its plain formula in float64, and what half precision may cost."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from causalrope_kernels import (
    Placement,
    Projection,
    attention,
    attention_lse,
    gate_add,
    merge,
    modulate,
    reference,
    rms_norm,
    rotate,
)

B, F, S, H, D, EPS = 2, 3, 4, 3, 8, 1e-6
T, WIDTH = F * S, H * D
UNIT = {torch.bfloat16: 2**-8, torch.float16: 2**-11}  # the relative error of rounding once
HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def rotation(tokens: int = T) -> tuple[Tensor, Tensor]:
    angles = 10 * random(tokens, D // 2, seed=1)
    return angles.cos(), angles.sin()


def plain_rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    turned = torch.empty_like(x)
    for token in range(x.shape[1]):
        for i in range(x.shape[-1] // 2):
            c, s = cos[token, i], sin[token, i]
            a, b = x[:, token, :, 2 * i], x[:, token, :, 2 * i + 1]
            turned[:, token, :, 2 * i], turned[:, token, :, 2 * i + 1] = a * c - b * s, a * s + b * c
    return turned


def plain_rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight


def plain_modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    mean, spread = x.mean(-1, keepdim=True), x.var(-1, correction=0, keepdim=True)
    normed = (x - mean) / (spread + EPS).sqrt()
    return by_token(x, lambda b, t: normed[b, t] * (1 + carried(scale, b, t)) + carried(shift, b, t))


def plain_gate_add(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    return by_token(x, lambda b, t: x[b, t] + y[b, t] * carried(gate, b, t))


def plain_attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    scores = torch.einsum("bthd,blhd->bthl", q, k) / math.sqrt(q.shape[-1])
    weights = scores.exp()
    total = weights.sum(-1)
    return torch.einsum("bthl,blhd->bthd", weights, v) / total.unsqueeze(-1), total.log()


def carried(by_frame: Tensor, batch: int, token: int) -> Tensor:
    """What the token's frame carries, the same for all of a batch (F, D) or not (B, F, D)."""
    return (by_frame if by_frame.ndim == 2 else by_frame[batch])[token // S]


def by_token(x: Tensor, value: Callable[[int, int], Tensor]) -> Tensor:
    return torch.stack([torch.stack([value(b, t) for t in range(x.shape[1])]) for b in range(x.shape[0])])


def close(result: Tensor, expected: Tensor, tolerance: float = 1e-13) -> None:
    assert result.dtype == expected.dtype
    torch.testing.assert_close(result, expected, rtol=tolerance, atol=tolerance)


def rounded_once(result: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    """Computed wide, rounded at the very end: each number is off by half a unit in its own last place."""
    assert result.dtype == dtype
    excess = (result.double() - exact).abs() - 1.01 * UNIT[dtype] * exact.abs()
    worst, largest = excess.max().item(), exact.abs().max().item()
    assert worst < 2e-5 * largest, f"worse than one rounding by {worst:.1e}"


def test_rotate() -> None:
    x, (cos, sin) = random(B, T, H, D), rotation()
    close(rotate(x, cos, sin), plain_rotate(x, cos, sin))
    torch.testing.assert_close(rotate(x, cos, sin).norm(dim=-1), x.norm(dim=-1))


def test_rms_norm() -> None:
    x, weight = random(B, T, WIDTH), random(WIDTH, seed=1)
    close(rms_norm(x, weight, EPS), plain_rms_norm(x, weight))
    assert not rms_norm(torch.zeros_like(x), weight, EPS).any()
    tiny = x * 1e-3
    close(rms_norm(tiny, weight, EPS), plain_rms_norm(tiny, weight))


def test_the_projection_norms_over_all_heads_then_rotates() -> None:
    qkv, q_weight, k_weight = random(B, T, 3 * WIDTH), random(WIDTH, seed=1), random(WIDTH, seed=2)
    cos, sin = rotation()
    projection = Projection(qkv, q_weight, k_weight, cos, sin, H, EPS)
    q, k, v = projection.tensors()
    for result, part, weight in ((q, qkv[..., :WIDTH], q_weight), (k, qkv[..., WIDTH : 2 * WIDTH], k_weight)):
        close(result, plain_rotate(plain_rms_norm(part, weight).view(B, T, H, D), cos, sin))
    assert torch.equal(v, qkv[..., 2 * WIDTH :].reshape(B, T, H, D))
    room = torch.full((3, H, T, B, D), math.nan, dtype=torch.float64).permute(0, 3, 2, 1, 4)
    projection.write([Placement(0, 1, *room[..., :1, :]), Placement(1, H, *room[..., 1:, :])])
    for written, result in zip(room, (q, k, v), strict=True):
        assert torch.equal(written, result)


@pytest.mark.parametrize("carrier", [(F, WIDTH), (B, F, WIDTH)], ids=["frame", "batch and frame"])
def test_modulate_and_gate_add_go_by_frame(carrier: tuple[int, ...]) -> None:
    x, y = random(B, T, WIDTH), random(B, T, WIDTH, seed=1)
    shift, scale = random(*carrier, seed=2), random(*carrier, seed=3)
    close(modulate(x, shift, scale, EPS), plain_modulate(x, shift, scale))
    close(gate_add(x, y, scale), plain_gate_add(x, y, scale))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("queries", "keys", "width"), [(1, 1, 8), (7, 31, 20), (65, 130, 64), (3, 600, 128)])
def test_fused_attention_is_no_further_off_than_the_reference(
    queries: int, keys: int, width: int, dtype: torch.dtype
) -> None:
    exact = [random(B, n, H, width, seed=seed) for seed, n in enumerate((queries, keys, keys))]
    output, lse = attention_lse(*(x.to(dtype) for x in exact))
    truth, true_lse = plain_attention(*(x.to(dtype).double() for x in exact))
    rough, rough_lse = reference.attention_lse(*(x.to(dtype) for x in exact))
    assert (output.dtype, lse.dtype) == (rough.dtype, rough_lse.dtype)
    unit = UNIT.get(dtype, torch.finfo(dtype).eps)
    assert (output.double() - truth).abs().max() <= 2 * (rough.double() - truth).abs().max() + 8 * unit**2
    assert (lse.double() - true_lse).abs().max() <= unit / 25 * true_lse.abs().max() + 8 * torch.finfo(lse.dtype).eps


@pytest.mark.parametrize("keys", [1, T, 31])
def test_attention(keys: int) -> None:
    q, k, v = random(B, T, H, D), random(B, keys, H, D, seed=1), random(B, keys, H, D, seed=2)
    expected, expected_lse = plain_attention(q, k, v)
    close(attention(q, k, v), expected)
    output, lse = attention_lse(q, k, v)
    close(output, expected)
    close(lse, expected_lse)
    order = torch.randperm(keys, generator=torch.Generator().manual_seed(0))
    close(attention(q, k[:, order], v[:, order]), expected)


def test_no_keys_are_zeros_and_minus_infinity() -> None:
    q, none = random(B, T, H, D), random(B, 0, H, D)
    output, lse = attention_lse(q, none, none)
    assert output.shape == q.shape
    assert not output.any()
    assert (lse == -math.inf).all()


def test_large_scores_do_not_overflow() -> None:
    q, k, v = 100 * random(1, 3, 1, D), 100 * random(1, 9, 1, D, seed=1), random(1, 9, 1, D, seed=2)
    output, lse = attention_lse(q, k, v)
    assert lse.isfinite().all()
    close(output, attention(q, k, v))
    parts = [attention_lse(q, k[:, part], v[:, part]) for part in (slice(0, 4), slice(4, 9))]
    merged, _ = merge(*zip(*parts))
    close(merged, output)


@given(owners=st.lists(st.integers(0, 4), min_size=1, max_size=24), parts=st.just(5), loud=st.sampled_from([1, 20]))
@settings(deadline=None, max_examples=50)
def test_parts_merge_to_attention_over_all_keys(owners: list[int], parts: int, loud: int) -> None:
    """Any partition of the keys, contiguous or not, with parts that own none."""
    keys = len(owners)
    q, k, v = random(B, 5, H, D), loud * random(B, keys, H, D, seed=1), random(B, keys, H, D, seed=2)
    mine = [[key for key, owner in enumerate(owners) if owner == part] for part in range(parts)]
    outputs, lses = zip(*(attention_lse(q, k[:, own], v[:, own]) for own in mine))
    output, lse = merge(outputs, lses)
    whole, whole_lse = attention_lse(q, k, v)
    close(output, whole, 1e-12)
    close(lse, whole_lse, 1e-12)
    left, left_lse = merge(outputs[:2] + outputs[3:], lses[:2] + lses[3:])
    both, both_lse = merge([outputs[2], left], [lses[2], left_lse])
    if len(mine[2]) < keys:
        close(both, whole, 1e-12)
        close(both_lse, whole_lse, 1e-12)


def test_merging_nothing_with_nothing_is_attention_over_nothing() -> None:
    q, none = random(B, T, H, D), random(B, 0, H, D)
    empty = attention_lse(q, none, none)
    output, lse = merge(*zip(empty, empty))
    assert (lse == -math.inf).all()
    assert not output.isnan().any()
    assert not output.any()


@HALVES
def test_half_precision_rotate_and_norms_round_once(dtype: torch.dtype) -> None:
    x, weight = random(B, T, WIDTH).to(dtype), random(WIDTH, seed=1).to(dtype)
    cos, sin = (table.float() for table in rotation())
    heads = x.view(B, T, H, D)
    turned = plain_rotate(heads.double(), cos.double(), sin.double())
    result = rotate(heads, cos, sin)
    assert result.dtype == dtype
    pairs = turned.unflatten(-1, (-1, 2)).norm(dim=-1, keepdim=True)  # a difference may cancel; its terms do not
    error = (result.double() - turned).unflatten(-1, (-1, 2)).abs()
    assert (error <= 1.01 * UNIT[dtype] * turned.unflatten(-1, (-1, 2)).abs() + 1e-6 * pairs).all()
    rounded_once(rms_norm(x, weight, EPS), plain_rms_norm(x.double(), weight.double()), dtype)


@HALVES
def test_half_precision_modulate_rounds_once(dtype: torch.dtype) -> None:
    x, shift, scale = (random(*shape, seed=i).to(dtype) for i, shape in enumerate([(B, T, WIDTH)] + 2 * [(F, WIDTH)]))
    exact = plain_modulate(x.double(), shift.double(), scale.double())
    rounded_once(modulate(x, shift, scale, EPS), exact, dtype)


@HALVES
def test_half_precision_gate_add_rounds_once(dtype: torch.dtype) -> None:
    x, y, gate = (random(*shape, seed=i).to(dtype) for i, shape in enumerate(2 * [(B, T, WIDTH)] + [(F, WIDTH)]))
    exact = plain_gate_add(x.double(), y.double(), gate.double())
    rounded_once(gate_add(x, y, gate), exact, dtype)


@HALVES
def test_half_precision_attention_is_bounded_by_its_values(dtype: torch.dtype) -> None:
    """Weights sum to one, so rounding the inputs' products and the output costs a few units of the largest value."""
    q, k, v = (random(B, n, H, D, seed=i).to(dtype) for i, n in enumerate((T, 40, 40)))
    exact, exact_lse = plain_attention(q.double(), k.double(), v.double())
    largest = v.double().abs().max()
    assert (attention(q, k, v).double() - exact).abs().max() < 2 * UNIT[dtype] * largest

    output, lse = reference.attention_lse(q, k, v)
    rounded_once(output, exact, dtype)
    assert lse.dtype == torch.float32
    torch.testing.assert_close(lse.double(), exact_lse, rtol=0, atol=1e-5)

    outputs, lses = zip(
        *(reference.attention_lse(q, k[:, a:b], v[:, a:b]) for a, b in ((0, 7), (7, 7), (7, 30), (30, 40)))
    )
    merged, merged_lse = merge(outputs, lses)
    assert merged.dtype == dtype
    assert (merged.double() - exact).abs().max() < 2 * UNIT[dtype] * largest
    torch.testing.assert_close(merged_lse.double(), exact_lse, rtol=0, atol=1e-5)
