"""Triton's attention and merge under its interpreter, by the rule of `test_triton_elementwise`."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from causalrope_kernels import Keys, Partial, RotateOnRead, attention_launch, attention_parts, merge, reference
from causalrope_kernels.arguments import Ranges
from causalrope_sp.grid import Shard
from causalrope_sp.models.rope import RotaryTables
from tests.support.observed_launches import observed
from tests.support.triton_cases import DEVICE, DTYPES, GRID, as_dtype, compare, no_worse, random

pytestmark = pytest.mark.usefixtures("bfloat16_as_on_a_gpu")


@pytest.mark.parametrize("shape", [(0, 3, 2), (1, 0, 2), (1, 3, 0)])
def test_nothing_to_attend_with_is_nothing(shape: tuple[int, int, int]) -> None:
    batch, _, heads = shape
    q, k = random(*shape, 20).half(), random(batch, 7, heads, 20).half()
    ((output, lse),) = attention_parts(q, Keys(k, k), "triton")
    assert (output.shape, lse.shape) == (q.shape, shape)


def whole(q: Tensor, keys: Keys, backend: str) -> Partial:
    return merge(attention_parts(q, keys, backend), backend="torch")


@DTYPES
@pytest.mark.parametrize(
    ("queries", "keys", "width"), [(1, 1, 20), (7, 31, 20), (65, 130, 64), (130, 70, 128), (3, 200, 6), (9, 40, 160)]
)
def test_attention(queries: int, keys: int, width: int, dtype: torch.dtype) -> None:
    q, (k, v) = random(2, queries, 3, width), random(2, 2, keys, 3, width, seed=1)
    compare(whole, q, Keys(k, v), dtype=dtype)
    compare(whole, q, Keys(k, v).heads(slice(0, 3)), dtype=dtype)


@DTYPES
def test_attention_over_stretches_of_a_ring(dtype: torch.dtype) -> None:
    q, (k, v) = random(2, 11, 3, 20), random(2, 2, 150, 3, 20, seed=1)
    compare(whole, q[:, :, 1:], Keys(k, v, ((3, 90), (95, 95), (100, 149))).heads(slice(1, 3)), dtype=dtype)
    bounds = torch.tensor([[0, 7], [20, 21]], dtype=torch.int32, device=DEVICE)
    compare(whole, q, Keys(k, v, ((0, 7), (20, 21)), bounds), dtype=dtype)


@DTYPES
@pytest.mark.parametrize("width", [20, 64, 128])
def test_keys_are_turned_on_read(width: int, dtype: torch.dtype) -> None:
    slots, tokens = 6, 13
    q, (k, v) = random(2, 9, 2, width), random(2, 2, slots * tokens, 2, width, seed=1)
    tables = RotaryTables(width, 10_000, Shard(GRID), DEVICE, torch.float64)
    rotate_on_read = tables.rotate_on_read([3, 0, 1, 2, 5, 4], tokens)
    ranges = ((0, 2 * tokens), (3 * tokens, 5 * tokens))
    compare(
        whole,
        q,
        Keys(k, v, ranges, torch.tensor(ranges, dtype=torch.int32, device=DEVICE), rotate_on_read),
        dtype=dtype,
    )


ROWS_OF_HEADS = (
    ((3, 90), (95, 95), (100, 149)),
    ((0, 1), (1, 1), (1, 1)),
    ((0, 0), (150, 150), (7, 7)),  # nothing
    ((0, 150), (0, 0), (0, 0)),
)


def lists(k: Tensor, v: Tensor, rows: tuple[Ranges, ...] = ROWS_OF_HEADS, on_read: RotateOnRead | None = None) -> Keys:
    bounds = torch.tensor(rows, dtype=torch.int32, device=DEVICE)
    return Keys(k, v, None, bounds, on_read, head_ranges=rows)


def masked(q: Tensor, keys: Keys) -> Partial:
    """Scores of all rows, of which each head sees its own."""
    assert keys.head_ranges is not None
    seen = torch.zeros(keys.k.shape[2], keys.k.shape[1], dtype=torch.bool, device=DEVICE)
    for head, ranges in enumerate(keys.head_ranges):
        for first, stop in ranges:
            seen[head, first:stop] = True
    scores = torch.einsum("bthd,blhd->bthl", q, keys.k) * q.shape[-1] ** -0.5
    scores = scores.masked_fill(~seen, -math.inf)
    return torch.einsum("bthl,blhd->bthd", scores.softmax(-1).nan_to_num(0.0), keys.v), scores.logsumexp(-1)


def test_heads_that_read_rows_of_their_own_are_a_mask() -> None:
    q, (k, v) = random(2, 11, 4, 20), random(2, 2, 150, 4, 20, seed=1)
    for heads in (slice(0, 4), slice(1, 3)):
        keys = lists(k, v).heads(heads)
        for ours, exact in zip(whole(q[:, :, heads], keys, "torch"), masked(q[:, :, heads], keys), strict=True):
            torch.testing.assert_close(ours, exact, rtol=1e-12, atol=1e-14)


@DTYPES
@pytest.mark.parametrize(("queries", "width"), [(11, 20), (65, 64), (3, 128)])
def test_heads_that_read_rows_of_their_own_are_one_launch(queries: int, width: int, dtype: torch.dtype) -> None:
    q, (k, v) = random(2, queries, 4, width), random(2, 2, 150, 4, width, seed=1)
    compare(whole, q, lists(k, v), dtype=dtype)
    compare(whole, q[:, :, 1:], lists(k, v).heads(slice(1, 4)), dtype=dtype)
    seen: list[tuple[int, ...]] = []
    with observed(lambda kernel, grid, *rest, **options: seen.append(grid)):
        attention_parts(q.float(), as_dtype(lists(k, v), torch.float32), "triton")
    ((_, programs, _),) = seen
    assert programs == 2 * 4, "batch entries by heads"


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("width", [20, 128])
def test_keys_of_heads_are_turned_on_read(width: int, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In bfloat16 the kernel rotates the queries; in float32 all keys are rotated before it runs."""
    monkeypatch.setattr(attention_launch, "shares", lambda *shape: count)
    monkeypatch.setattr(attention_launch, "PLANS", {})
    slots, tokens = 6, 13
    q, (k, v) = random(2, 9, 3, width), random(2, 2, slots * tokens, 3, width, seed=1)
    tables = RotaryTables(width, 10_000, Shard(GRID), DEVICE, torch.float64)
    of_heads = (((0, 2), (3, 5)), ((1, 1), (4, 6)), ((0, 6), (0, 0)))
    rows = tuple(tuple((first * tokens, stop * tokens) for first, stop in ranges) for ranges in of_heads)
    for dtype in (torch.float32, torch.bfloat16):
        compare(whole, q, lists(k, v, rows, tables.rotate_on_read([3, 0, 1, 2, 5, 4], tokens)), dtype=dtype)


@pytest.mark.parametrize("count", [2, 3, 8])
def test_shares_of_the_keys_add_up(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every stretch, and of slots; some get none."""
    monkeypatch.setattr(attention_launch, "shares", lambda *shape: count)
    monkeypatch.setattr(attention_launch, "PLANS", {})
    q, (k, v) = random(2, 5, 2, 20), random(2, 2, 300, 2, 20, seed=1)
    assert len(attention_parts(q.float(), as_dtype(Keys(k, v), torch.float32), "triton")) == count
    for dtype in (torch.float32, torch.bfloat16):
        compare(whole, q, Keys(k, v, ((0, 150), (160, 165))), dtype=dtype)
        compare(whole, q, lists(k, v, (((0, 150), (160, 165)), ((299, 300), (7, 7)))), dtype=dtype)
    rotate_on_read = RotaryTables(20, 10_000, Shard(GRID), DEVICE, torch.float64).rotate_on_read(range(6), 50)
    compare(whole, q, Keys(k, v, ((50, 250),), rotate_on_read=rotate_on_read), dtype=torch.bfloat16)


def test_few_queries_get_shares_that_fill_a_gpu() -> None:
    cpu = torch.device("cpu")
    assert attention_launch.shares(37 * 12, 32_760, cpu) == 2  # 3.4 waves become 6.7
    assert attention_launch.shares(5 * 12, 32_760, cpu) == 2
    assert attention_launch.shares(12, 32_760, cpu) == 8
    assert attention_launch.shares(12, 512, cpu) == 1
    assert attention_launch.shares(132, 32_760, cpu) == 1


@pytest.mark.parametrize("count", [1, 3])
def test_bounds_are_read_on_the_device(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same launch with other numbers in the same tensor: what a captured graph does from chunk to chunk."""
    monkeypatch.setattr(attention_launch, "shares", lambda *shape: count)
    monkeypatch.setattr(attention_launch, "PLANS", {})
    q, (k, v) = random(1, 5, 2, 20).float(), random(2, 1, 60, 2, 20, seed=1).float()
    bounds = torch.tensor([[0, 60]], dtype=torch.int32, device=DEVICE)
    keys = Keys(k, v, ((0, 60),), bounds)
    for first, stop in ((0, 20), (0, 40), (30, 60), (7, 7)):
        bounds.copy_(torch.tensor([[first, stop]]))
        output, lse = whole(q, keys, "triton")
        expected, expected_lse = whole(q, Keys(k, v, ((first, stop),)), "torch")
        torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(lse, expected_lse, rtol=1e-5, atol=1e-6)


def test_bounds_of_heads_are_read_on_the_device() -> None:
    q, (k, v) = random(1, 5, 2, 20).float(), random(2, 1, 60, 2, 20, seed=1).float()
    keys = lists(k, v, (((0, 60), (0, 0)), ((0, 60), (0, 0))))
    for rows in ((((0, 20), (30, 40)), ((7, 7), (8, 9))), (((5, 6), (0, 0)), ((0, 30), (30, 60)))):
        keys.bounds.copy_(torch.tensor(rows))
        expected = whole(q, lists(k, v, rows), "torch")
        torch.testing.assert_close(whole(q, keys, "triton"), expected, rtol=1e-5, atol=1e-6)


def test_large_scores_do_not_overflow() -> None:
    q, (k, v) = 200 * random(1, 3, 1, 20), 200 * random(2, 1, 90, 1, 20, seed=1)
    compare(whole, q, Keys(k, v), dtype=torch.float32)


def some_parts(count: int, width: int, heads: int = 3) -> list[Partial]:
    parts = [(random(2, 7, heads, width, seed=n), 5 * random(2, 7, heads, seed=n + 100)) for n in range(count)]
    for n in range(1, count):
        parts[n][1][:, n % 7] = -math.inf
    return parts


@DTYPES
@pytest.mark.parametrize(("count", "width"), [(2, 20), (3, 128), (9, 64), (40, 6)])
def test_merge(count: int, width: int, dtype: torch.dtype) -> None:
    """Log-sum-exps are float32 in half precision too."""
    parts = some_parts(count, width)
    for output, lse in parts:
        output.masked_fill_((lse == -math.inf).unsqueeze(-1), 0.0)
    given = [(output.to(dtype), lse.float()) for output, lse in parts]
    truth = reference.merge([(output.double(), lse.double()) for output, lse in given])
    for ours, rough, exact in zip(merge(given, "triton"), merge(given, "torch"), truth, strict=True):
        no_worse(ours, rough, exact)


@pytest.mark.parametrize("together", [True, False])
def test_parts_are_merged_as_they_arrived(together: bool) -> None:
    """Log-sum-exps behind all outputs, or each behind its own; an output without keys may hold anything."""
    if together:
        wire = torch.full((3, 2 * 7 * 3 * (20 + 2)), math.nan, dtype=torch.bfloat16, device=DEVICE)
        opened = [piece.split([2 * 7 * 3 * 20, 2 * 7 * 3 * 2]) for piece in wire]
        arrived = [(o.view(2, 7, 3, 20), weights.view(torch.float32).view(2, 7, 3)) for o, weights in opened]
    else:
        rows = torch.full((3, 2, 7, 3, 20 + 2), math.nan, dtype=torch.bfloat16, device=DEVICE)
        arrived = [(piece[..., :20], piece[..., 20:].view(torch.float32).squeeze(-1)) for piece in rows]
    for (place_of_output, place_of_lse), (output, lse) in zip(arrived, some_parts(3, 20), strict=True):
        place_of_output.copy_(output.masked_fill((lse == -math.inf).unsqueeze(-1), math.nan))
        place_of_lse.copy_(lse)
    output, lse = merge(arrived, "triton")
    cleared = [(o.masked_fill((weight == -math.inf).unsqueeze(-1), 0.0), weight) for o, weight in arrived]
    expected, expected_lse = reference.merge(cleared)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(lse, expected_lse)


def test_merging_nothing_gives_zeros_and_minus_infinity() -> None:
    nothing = (torch.full((1, 3, 2, 20), math.nan, device=DEVICE), torch.full((1, 3, 2), -math.inf, device=DEVICE))
    output, lse = merge([nothing, nothing], "triton")
    assert not output.any()
    assert (lse == -math.inf).all()
