"""Queries that see some tokens of each slot, on Triton and on torch, against a mask in float64."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from causalrope_kernels import Bands, Keys, Partial, attention_launch, attention_parts, merge
from causalrope_kernels.quantized_heads import dequantize, quantize
from causalrope_sp.grid import Shard
from causalrope_sp.models.rope import RotaryTables
from tests.support.observed_launches import observed
from tests.support.triton_cases import DEVICE, GRID, no_worse, random

pytestmark = pytest.mark.usefixtures("bfloat16_as_on_a_gpu")

FRAMES, SLOTS, TOKENS, WIDTH = 2, 5, 13, 20
BANDS = Bands(((0, 4), (4, 5), (5, 11)), ((0, 9), (7, 7), (3, 13)), TOKENS)  # of 11 queries; one band sees nothing
RANGES = ((0, 2 * TOKENS), (3 * TOKENS, 5 * TOKENS))
LISTS = (RANGES, ((TOKENS, TOKENS), (0, 5 * TOKENS)))
ORDER = [3, 0, 1, 2, 4]  # of the slots, in time


def masked(q: Tensor, k: Tensor, v: Tensor, by_head: tuple[Any, ...]) -> Partial:
    """Scores of all rows, of which each query of a head sees its own."""
    seen = torch.zeros(q.shape[1], q.shape[2], k.shape[1], dtype=torch.bool, device=DEVICE)
    for head, ranges in enumerate(by_head):
        for (first, stop), (a, b) in zip(BANDS.queries, BANDS.keys, strict=True):
            for token in (frame * 11 + t for frame in range(FRAMES) for t in range(first, stop)):
                for slot in (s for begin, end in ranges for s in range(begin // TOKENS, end // TOKENS)):
                    seen[token, head, slot * TOKENS + a : slot * TOKENS + b] = True
    scores = torch.einsum("bthd,blhd->bthl", q, k) * q.shape[-1] ** -0.5
    scores = scores.masked_fill(~seen, -math.inf)
    return torch.einsum("bthl,blhd->bthd", scores.softmax(-1).nan_to_num(0.0), v), scores.logsumexp(-1)


def drawn(lists: bool, rotates: bool, stored: torch.dtype | None) -> tuple[Tensor, Keys, tuple[Tensor, Tensor]]:
    """Queries and keys with bands, in float64 but for what is quantized, and what is attended: keys and values."""
    q, (k, v) = random(2, FRAMES * 11, 3, WIDTH)[:, :, 1:], random(2, 2, SLOTS * TOKENS, 2, WIDTH, seed=1)
    given: dict[str, Any] = {"head_ranges": LISTS} if lists else {"ranges": RANGES}
    wide_k, wide_v = k, v
    if stored is not None:
        (k, k_scales), (v, v_scales) = quantize(k, stored), quantize(v, stored)
        wide_k, wide_v = dequantize(k, k_scales, torch.float64), dequantize(v, v_scales, torch.float64)
        given |= {"k_scales": k_scales, "v_scales": v_scales}
    if rotates:
        tables = RotaryTables(WIDTH, 10_000, Shard(GRID), DEVICE, torch.float64)
        given["rotate_on_read"] = tables.rotate_on_read(ORDER, TOKENS)
        cos, sin = given["rotate_on_read"].table.repeat_interleave(TOKENS, 0).unbind(1)
        pairs = torch.view_as_complex(wide_k.unflatten(-1, (-1, 2))).clone()
        pairs[..., : cos.shape[-1]] *= torch.complex(cos, sin)[:, None]
        wide_k = torch.view_as_real(pairs).flatten(-2)
    return q, Keys(k, v, bands=BANDS, **given), (wide_k, wide_v)


def whole(q: Tensor, keys: Keys, backend: str) -> Partial:
    return merge(attention_parts(q, keys, backend), backend="torch")


STORED = pytest.mark.parametrize("stored", [None, torch.int8, torch.float8_e4m3fn])


@STORED
@pytest.mark.parametrize("rotates", [False, True])
@pytest.mark.parametrize("lists", [False, True])
def test_bands_are_a_mask(lists: bool, rotates: bool, stored: torch.dtype | None) -> None:
    q, keys, attended = drawn(lists, rotates, stored)
    exact = masked(q, *attended, LISTS if lists else (RANGES, RANGES))
    for ours, truth in zip(whole(q, keys, "torch"), exact, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("lists", "rotates", "stored", "dtype", "count"),
    [
        (False, False, None, torch.float32, 1),
        (True, False, torch.int8, torch.bfloat16, 1),
        (False, True, None, torch.bfloat16, 3),
        (False, True, torch.float8_e4m3fn, torch.float32, 1),  # rotated by torch, block by block
    ],
)
def test_all_bands_are_one_launch(
    lists: bool,
    rotates: bool,
    stored: torch.dtype | None,
    dtype: torch.dtype,
    count: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attention_launch, "shares", lambda *shape: count)
    monkeypatch.setattr(attention_launch, "PLANS", {})
    q, keys, _ = drawn(lists, rotates, stored)
    q, turn = q.to(dtype), keys.rotate_on_read
    wide = keys if stored is not None else replace(keys, k=keys.k.to(dtype).double(), v=keys.v.to(dtype).double())
    low = keys if stored is not None else replace(keys, k=keys.k.to(dtype), v=keys.v.to(dtype))
    if turn is not None:
        low = replace(low, rotate_on_read=replace(turn, table=turn.table.float()))
    exact = whole(q.double(), wide, "torch")
    for ours, rough, truth in zip(whole(q, low, "triton"), whole(q, low, "torch"), exact, strict=True):
        no_worse(ours, rough.to(ours.dtype), truth)
    grids: list[tuple[int, ...]] = []
    with observed(lambda kernel, grid, *rest, **options: grids.append(grid)):
        attention_parts(q, low, "triton")
    assert grids == ([] if rotates and dtype == torch.float32 else [(2 * 3, 2 * 2, count)])
