"""The torch kernels against formulas written out: in float64, in half precision, and by their gradients."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from causalrope_kernels import (
    Affine,
    Keys,
    Modulation,
    PassOperations,
    Pieces,
    Projection,
    RotateOnRead,
    Rotation,
    Slots,
    add_norm,
    attention,
    attention_parts,
    linear,
    linear_gelu,
    merge,
    norm_rope_store,
    project,
    reference,
    rms_norm,
)
from causalrope_kernels.reference import attention_lse, rotate
from tests.support.kernel_inputs import EPS, WIDTH, B, D, F, H, S, T, a_rotation, random

UNIT = {torch.bfloat16: 2**-8, torch.float16: 2**-11}  # the relative error of rounding once
HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])


def angles() -> tuple[Tensor, Tensor]:
    turns = 10 * random(T, D // 2, seed=1)
    return turns.cos(), turns.sin()


def plain_rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    rotated = torch.empty_like(x)
    for token in range(x.shape[1]):
        for i in range(x.shape[-1] // 2):
            c, s = cos[token, i], sin[token, i]
            a, b = x[:, token, :, 2 * i], x[:, token, :, 2 * i + 1]
            rotated[:, token, :, 2 * i], rotated[:, token, :, 2 * i + 1] = a * c - b * s, a * s + b * c
    return rotated


def plain_rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight


def plain_norm(x: Tensor) -> Tensor:
    mean, spread = x.mean(-1, keepdim=True), x.var(-1, correction=0, keepdim=True)
    return (x - mean) / (spread + EPS).sqrt()


def plain_modulate(x: Tensor, shift: Tensor, factor: Tensor) -> Tensor:
    normed = plain_norm(x)
    return by_token(x, lambda b, t: normed[b, t] * carried(factor, b, t) + carried(shift, b, t))


def plain_gate_add(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    return by_token(x, lambda b, t: x[b, t] + y[b, t] * carried(gate, b, t))


def plain_attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    scores = torch.einsum("bthd,blhd->bthl", q, k) / math.sqrt(q.shape[-1])
    weights = scores.exp()
    total = weights.sum(-1)
    return torch.einsum("bthl,blhd->bthd", weights, v) / total.unsqueeze(-1), total.log()


def carried(vectors: Tensor, batch: int, token: int) -> Tensor:
    """The vector of the token's frame, the same for all of a batch (F, D) or not (B, F, D)."""
    return (vectors if vectors.ndim == 2 else vectors[batch])[token // S].double()


def vectors(*carrier: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return random(*carrier, seed=seed).to(dtype)


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
    x, (cos, sin) = random(B, T, H, D), angles()
    close(rotate(x, cos, sin), plain_rotate(x, cos, sin))
    torch.testing.assert_close(rotate(x, cos, sin).norm(dim=-1), x.norm(dim=-1))


def test_rms_norm() -> None:
    x, weight = random(B, T, WIDTH), random(WIDTH, seed=1)
    close(rms_norm(x, weight, EPS), plain_rms_norm(x, weight))
    assert not rms_norm(torch.zeros_like(x), weight, EPS).any()
    tiny = x * 1e-3
    close(rms_norm(tiny, weight, EPS), plain_rms_norm(tiny, weight))


def plain_angles(rotation: Rotation, times: Tensor) -> tuple[Tensor, Tensor]:
    rows = []
    for time in times.tolist():
        for g in range(rotation.start, rotation.start + rotation.tokens):
            places = (rotation.time[time], rotation.row[g // rotation.columns], rotation.column[g % rotation.columns])
            rows.append(torch.cat(places, -1))
    cos, sin = torch.stack(rows).unbind(1)
    return cos, sin


def test_the_projection_norms_over_all_heads_then_rotates() -> None:
    qkv, q_weight, k_weight = random(B, F, S, 3 * WIDTH), random(WIDTH, seed=1), random(WIDTH, seed=2)
    rotation = a_rotation()
    projection = Projection(qkv, q_weight, k_weight, rotation, H, EPS)
    q, k, v = project(projection)
    flat = qkv.flatten(1, 2)
    for result, part, weight, times in (
        (q, flat[..., :WIDTH], q_weight, rotation.query_times_F),
        (k, flat[..., WIDTH : 2 * WIDTH], k_weight, rotation.key_times_F),
    ):
        turns = plain_angles(rotation, times)
        close(result, plain_rotate(plain_rms_norm(part, weight).view(B, T, H, D), *turns))
    assert torch.equal(v, flat[..., 2 * WIDTH :].reshape(B, T, H, D))


def test_a_source_writes_frames_and_heads_where_they_are_wanted() -> None:
    """From a projection and from pieces, into views by heads and into the slots of a ring."""
    q_weight, k_weight = random(2, WIDTH, seed=1)
    projection = Projection(random(B, F, S, 3 * WIDTH), q_weight, k_weight, a_rotation(), H, EPS)
    whole = torch.stack(project(projection)).unflatten(2, (F, S))
    pieces = Pieces([whole[:, :, :, :1], whole[:, :, :, 1:]])
    assert pieces.shape == projection.shape == (B, F, S, H, D)
    slots = torch.tensor([4, 1])
    for source in (projection, pieces):
        room = torch.full((2, H, F - 1, B, S, D), math.nan, dtype=torch.float64).permute(0, 3, 2, 4, 1, 5)
        ring = torch.full((B, 5, S, H, D), math.nan, dtype=torch.float64)
        q, k = ([Slots(x[..., :1, :]), Slots(x[..., 1:, :])] for x in room)
        norm_rope_store(source.part(slice(1, 3)), q=q, k=k, v=[Slots(ring, slots)])
        close(room[0], whole[0, :, 1:])  # `project` keeps to the reference, which rotates by cosines and sines
        close(room[1], whole[1, :, 1:])
        assert torch.equal(ring[:, slots], whole[2, :, 1:])
        assert ring[:, [0, 2, 3]].isnan().all()
    kv = Pieces([whole[1:, :, :, :3], whole[1:, :, :, 3:]])
    ring = torch.full((2, B, 5, S, H, D), math.nan, dtype=torch.float64)
    norm_rope_store(kv, k=[Slots(ring[0, :, :F])], v=[Slots(ring[1, :, 2:])])
    assert torch.equal(ring[0, :, :F], whole[1])
    assert torch.equal(ring[1, :, 2:], whole[2])


def test_slots_that_follow_each_other_are_written_as_slots_that_are_scattered() -> None:
    q_weight, k_weight = random(2, WIDTH, seed=1)
    projection = Projection(random(B, F, S, 3 * WIDTH), q_weight, k_weight, a_rotation(), H, EPS)
    slots = torch.arange(1, 1 + F)
    scattered, together = torch.full((2, 3, B, F + 2, S, H, D), math.nan, dtype=torch.float64)
    q, k, v = ([Slots(x, slots)] for x in scattered)
    norm_rope_store(projection, q=q, k=k, v=v)
    q, k, v = ([Slots(x, slots, x[:, 1:-1])] for x in together)
    norm_rope_store(projection, q=q, k=k, v=v)
    assert torch.equal(together[:, :, 1:-1], scattered[:, :, 1:-1])
    assert together[:, :, [0, -1]].isnan().all()


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_settled_linear_layer_with_a_copy_of_its_weight_is_the_layer(gelu: bool, dtype: torch.dtype) -> None:
    """With so few rows that oneDNN is left out, and with more."""
    weight, bias, x = (random(*shape).to(dtype) for shape in ((96, 64), (96,), (1, 256, 64)))
    compute = PassOperations.unchecked(weight, packed=True).settled_linear(weight, bias, gelu)
    for rows in (x[:, :2], x):
        expected = (linear_gelu if gelu else linear)(rows.double(), weight.double(), bias.double())
        plain = (reference.linear_gelu if gelu else functional.linear)(rows, weight, bias)
        assert (compute(rows.double()) - expected).norm() <= 2 * (plain - expected).norm()


@pytest.mark.parametrize("carrier", [(F, WIDTH), (B, F, WIDTH)], ids=["frame", "batch and frame"])
def test_add_norm_goes_by_frame(carrier: tuple[int, ...]) -> None:
    x, y = random(B, T, WIDTH), random(B, T, WIDTH, seed=1)
    gate, shift, factor = (vectors(*carrier, seed=seed) for seed in (2, 4, 6))
    modulation = Modulation(shift, factor, EPS)
    total, normed = add_norm(x, y, gate, modulation)
    close(total, plain_gate_add(x, y, gate))
    close(normed, plain_modulate(plain_gate_add(x, y, gate), shift, factor))
    total, normed = add_norm(x, None, None, modulation)
    assert torch.equal(total, x)
    close(normed, plain_modulate(x, shift, factor))
    weight, bias = random(2, WIDTH, seed=8)
    total, normed = add_norm(x, y, None, Affine(weight, bias, EPS))
    close(total, x + y)
    close(normed, plain_norm(x + y) * weight + bias)


def test_linear_gelu() -> None:
    x, weight, bias = random(B, T, WIDTH), random(7, WIDTH, seed=1), random(7, seed=2)
    z = x @ weight.t() + bias
    close(linear_gelu(x, weight, bias), 0.5 * z * (1 + ((2 / math.pi) ** 0.5 * (z + 0.044715 * z**3)).tanh()))


def test_keys_are_turned_slot_by_slot_in_their_first_pairs() -> None:
    k, table = random(B, 6, H, D), random(3, 2, 2, seed=1)
    by_row = table.repeat_interleave(2, 0)
    expected = plain_rotate(k[..., :4], by_row[:, 0], by_row[:, 1])
    result = reference.rotated(k, RotateOnRead(table, 2))
    close(result[..., :4], expected)
    assert torch.equal(result[..., 4:], k[..., 4:])
    later = reference.rotated(k[:, 2:], RotateOnRead(table, 2), first=2)
    assert torch.equal(later, result[:, 2:])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("queries", "keys", "width"), [(1, 1, 8), (7, 31, 20), (65, 130, 64), (3, 600, 128)])
def test_fused_attention_is_no_further_off_than_the_reference(
    queries: int, keys: int, width: int, dtype: torch.dtype
) -> None:
    exact = [random(B, n, H, width, seed=seed) for seed, n in enumerate((queries, keys, keys))]
    q, k, v = (x.to(dtype) for x in exact)
    ((output, lse),) = attention_parts(q, Keys(k, v))
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
    close(attention(q, Keys(k, v)), expected)
    output, lse = attention_lse(q, k, v)
    close(output, expected)
    close(lse, expected_lse)
    order = torch.randperm(keys, generator=torch.Generator().manual_seed(0))
    close(attention(q, Keys(k[:, order], v[:, order])), expected)


def test_attention_over_stretches_is_that_over_their_rows() -> None:
    q, k, v = random(B, T, H, D), random(B, 31, H, D, seed=1), random(B, 31, H, D, seed=2)
    rows = [*range(3, 10), *range(20, 31)]
    keys = Keys(k, v, ((3, 10), (15, 15), (20, 31)))
    expected, expected_lse = plain_attention(q, k[:, rows], v[:, rows])
    close(attention(q, keys), expected)
    parts = attention_parts(q, keys)
    assert len(parts) == 2
    close(merge(parts)[1], expected_lse)
    close(attention(q[:, :, 1:], keys.heads(slice(1, None))), expected[:, :, 1:])


def test_no_keys_are_zeros_and_minus_infinity() -> None:
    q, none = random(B, T, H, D), random(B, 0, H, D)
    for keys in (Keys(none, none), Keys(q, q, ((2, 2),)), Keys(q, q, ())):
        ((output, lse),) = attention_parts(q, keys)
        assert output.shape == q.shape
        assert not output.any()
        assert (lse == -math.inf).all()
        assert not attention(q, keys).any()


def test_large_scores_do_not_overflow() -> None:
    q, k, v = 100 * random(1, 3, 1, D), 100 * random(1, 9, 1, D, seed=1), random(1, 9, 1, D, seed=2)
    output, lse = attention_lse(q, k, v)
    assert lse.isfinite().all()
    close(output, attention(q, Keys(k, v)))
    merged, _ = merge([attention_lse(q, k[:, part], v[:, part]) for part in (slice(0, 4), slice(4, 9))])
    close(merged, output)


@given(owners=st.lists(st.integers(0, 4), min_size=1, max_size=24), parts=st.just(5), loud=st.sampled_from([1, 20]))
@settings(deadline=None, max_examples=50)
def test_parts_merge_to_attention_over_all_keys(owners: list[int], parts: int, loud: int) -> None:
    """Any partition of the keys, contiguous or not, with parts that own none."""
    keys = len(owners)
    q, k, v = random(B, 5, H, D), loud * random(B, keys, H, D, seed=1), random(B, keys, H, D, seed=2)
    mine = [[key for key, owner in enumerate(owners) if owner == part] for part in range(parts)]
    found = [attention_lse(q, k[:, own], v[:, own]) for own in mine]
    output, lse = merge(found)
    whole, whole_lse = attention_lse(q, k, v)
    close(output, whole, 1e-12)
    close(lse, whole_lse, 1e-12)
    both, both_lse = merge([found[2], merge(found[:2] + found[3:])])
    if len(mine[2]) < keys:
        close(both, whole, 1e-12)
        close(both_lse, whole_lse, 1e-12)


def test_merging_nothing_with_nothing_is_attention_over_nothing() -> None:
    q, none = random(B, T, H, D), random(B, 0, H, D)
    empty = attention_lse(q, none, none)
    output, lse = merge([empty, empty])
    assert (lse == -math.inf).all()
    assert not output.isnan().any()
    assert not output.any()


@HALVES
def test_half_precision_rotate_and_norms_round_once(dtype: torch.dtype) -> None:
    x, weight = random(B, T, WIDTH).to(dtype), random(WIDTH, seed=1).to(dtype)
    cos, sin = (table.float() for table in angles())
    heads = x.view(B, T, H, D)
    rotated = plain_rotate(heads.double(), cos.double(), sin.double())
    result = rotate(heads, cos, sin)
    assert result.dtype == dtype
    pairs = rotated.unflatten(-1, (-1, 2)).norm(dim=-1, keepdim=True)  # a difference may cancel; its terms do not
    error = (result.double() - rotated).unflatten(-1, (-1, 2)).abs()
    assert (error <= 1.01 * UNIT[dtype] * rotated.unflatten(-1, (-1, 2)).abs() + 1e-6 * pairs).all()
    rounded_once(rms_norm(x, weight, EPS), plain_rms_norm(x.double(), weight.double()), dtype)


@HALVES
def test_half_precision_add_norm_rounds_once(dtype: torch.dtype) -> None:
    x, y = (random(B, T, WIDTH, seed=seed).to(dtype) for seed in range(2))
    gate, shift, factor = (vectors(F, WIDTH, seed=seed, dtype=dtype) for seed in (2, 4, 6))
    exact = plain_gate_add(x.double(), y.double(), gate)
    total, normed = add_norm(x, y, gate, Modulation(shift, factor, EPS))
    rounded_once(total, exact, dtype)
    rounded_once(normed, plain_modulate(exact, shift, factor), dtype)


@HALVES
def test_half_precision_attention_is_bounded_by_its_values(dtype: torch.dtype) -> None:
    """Weights sum to one, so rounding the inputs' products and the output costs a few units of the largest value."""
    q, k, v = (random(B, n, H, D, seed=i).to(dtype) for i, n in enumerate((T, 40, 40)))
    exact, exact_lse = plain_attention(q.double(), k.double(), v.double())
    largest = v.double().abs().max()
    assert (attention(q, Keys(k, v)).double() - exact).abs().max() < 2 * UNIT[dtype] * largest

    output, lse = reference.attention_lse(q, k, v)
    rounded_once(output, exact, dtype)
    assert lse.dtype == torch.float32
    torch.testing.assert_close(lse.double(), exact_lse, rtol=0, atol=1e-5)

    bounds = ((0, 7), (7, 7), (7, 30), (30, 40))
    merged, merged_lse = merge([reference.attention_lse(q, k[:, a:b], v[:, a:b]) for a, b in bounds])
    assert merged.dtype == dtype
    assert (merged.double() - exact).abs().max() < 2 * UNIT[dtype] * largest
    torch.testing.assert_close(merged_lse.double(), exact_lse, rtol=0, atol=1e-5)


def test_attention_over_stretches_has_its_gradient() -> None:
    q, (k, v) = random(1, 3, 2, D), random(2, 1, 9, 2, D, seed=1)
    for x in (q, k, v):
        x.requires_grad_()
    assert torch.autograd.gradcheck(lambda q, k, v: attention(q, Keys(k, v, ((0, 4), (5, 9)))), (q, k, v))


def test_parts_of_a_rotation_are_those_frames() -> None:
    rotation = a_rotation()
    for frames in (slice(0, None, 2), slice(0, 3, 2), slice(0, 3), slice(1, 2), slice(0, None, 3)):
        assert torch.equal(rotation.part(frames).query_times_F, rotation.query_times_F[frames])


def test_merging_weighs_by_differences_and_not_by_size() -> None:
    outputs, lses = random(2, 1, 3, 2, D).float(), 1e5 + random(2, 1, 3, 2, seed=1).float()
    exact, _ = merge([(o.double(), lse.double()) for o, lse in zip(outputs, lses)])
    assert (merge(list(zip(outputs, lses)))[0].double() - exact).norm() < 1e-6 * exact.norm()
