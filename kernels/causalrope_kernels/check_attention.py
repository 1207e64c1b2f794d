"""Checks of the arguments of attention and of its merge, beside those of `check`."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor

from causalrope_kernels import check, check_quantized
from causalrope_kernels.arguments import Keys, Ranges
from causalrope_kernels.bands import Bands


def attention(q_BTHD: Tensor, keys: Keys) -> None:
    """Checks the arguments of `attention` and `attention_parts`."""
    check.shape("q", q_BTHD, (None, None, None, None), "(B, T, H, d)")
    check.same("q", q_BTHD, q_BTHD)
    batch, _, heads, width = q_BTHD.shape
    if width < 1 or keys.k.ndim != 4:
        raise ValueError(f"k: expected shape (B, L, H, d) with d at least 1, not {tuple(keys.k.shape)}")
    plain = keys.k_scales is None and keys.v_scales is None
    for name, x in (("k", keys.k), ("v", keys.v)):
        check.shape(name, x, (batch, keys.k.shape[1], heads, width), "(B, L, H, d)")
        if plain:
            check.same(name, x, q_BTHD)
        check.dense(name, x)
    if not plain:
        check_quantized.keys(keys, q_BTHD)
    check.dense("q", q_BTHD)
    rows = keys.k.shape[1]
    ranges = _ranges(keys, heads)
    for first, stop in ranges:
        if not 0 <= first <= stop <= rows:
            raise ValueError(f"ranges: expected [first, stop) within {rows} rows, not [{first}, {stop})")
    if keys.bounds_N2 is not None:
        _bounds(keys, keys.bounds_N2)
    if keys.rotate_on_read is not None:
        table, tokens = keys.rotate_on_read.table, keys.rotate_on_read.tokens
        check.shape("rotate_on_read.table", table, (None, 2, None), "(K, 2, E)")
        check.same("rotate_on_read.table", table, q_BTHD, dtype=False)
        check.dense("rotate_on_read.table", table, 3)
        if tokens < 1 or rows > len(table) * tokens or 2 * table.shape[2] > width:
            raise ValueError(
                f"rotate_on_read: expected angles for {rows} rows of {width // 2} channel pairs, not {len(table)} slots"
                f" of {tokens} tokens and {table.shape[2]} pairs"
            )
        _whole_slots(ranges, tokens, "keys are rotated on read")
    if keys.bands is not None:
        _bands(keys, keys.bands, q_BTHD.shape[1], ranges)


def _ranges(keys: Keys, heads: int) -> Ranges:
    """All ranges of rows that are read, of every head."""
    if keys.head_ranges is None:
        return keys.rows
    if keys.ranges is not None:
        raise ValueError("head_ranges: expected None with ranges, which hold for all heads, not both")
    counts = [len(of_head) for of_head in keys.head_ranges]
    if len(counts) != heads or 0 in counts or len(set(counts)) != 1:
        raise ValueError(
            f"head_ranges: expected as many ranges, and one or more, for each of {heads} heads, not {counts}"
        )
    return tuple(chain(*keys.head_ranges))


def _bounds(keys: Keys, bounds: Tensor) -> None:
    """Checks the ranges on the device."""
    if keys.ranges is None and keys.head_ranges is None:
        raise ValueError("bounds_N2: expected ranges with it, not None")
    check.dense("bounds_N2", bounds, bounds.ndim)
    lists = keys.head_ranges
    expected = (len(keys.rows), 2) if lists is None else (len(lists), len(lists[0]), 2)
    if bounds.shape != expected or bounds.dtype != torch.int32 or bounds.device != keys.k.device:
        raise ValueError(
            f"bounds_N2: expected int32 of shape {expected} on {keys.k.device}, not {bounds.dtype} of shape "
            f"{tuple(bounds.shape)} on {bounds.device}"
        )


def _whole_slots(ranges: Ranges, tokens: int, why: str) -> None:
    if any(first % tokens or stop % tokens for first, stop in ranges):
        raise ValueError(f"ranges: expected whole slots of {tokens} rows, as {why}, not {ranges}")


def _bands(keys: Keys, bands: Bands, queries: int, ranges: Ranges) -> None:
    """Checks the bands of a frame."""
    tokens, spans = bands.slot_tokens, bands.queries
    follow = all(a < b for a, b in spans) and [0, *(b for _, b in spans[:-1])] == [a for a, _ in spans]
    if not spans or not follow or len(bands.keys) != len(spans) or queries % bands.frame_queries:
        raise ValueError(
            f"bands: expected queries of a frame, of {queries} in all, that follow each other, with keys for each, not "
            f"{spans} with {bands.keys}"
        )
    if tokens < 1 or keys.k.shape[1] % tokens or not all(0 <= a <= b <= tokens for a, b in bands.keys):
        raise ValueError(
            f"bands: expected keys within a slot, and whole slots in {keys.k.shape[1]} rows, not {bands.keys} in slots "
            f"of {tokens}"
        )
    if keys.rotate_on_read is not None and keys.rotate_on_read.tokens != tokens:
        raise ValueError(
            f"bands: expected slots of {keys.rotate_on_read.tokens} rows, as keys are rotated on read, not {tokens}"
        )
    _whole_slots(ranges, tokens, "queries see some tokens of each")


def parts(partials: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Checks the arguments of `merge`."""
    if not partials:
        raise ValueError("parts: expected at least one, not none")
    first, first_lse = partials[0]
    check.shape("parts[0] output", first, (None, None, None, None), "(B, T, H, d)")
    for number, (output, lse) in enumerate(partials):
        check.shape(f"parts[{number}] output", output, first.shape, "(B, T, H, d)")
        check.same(f"parts[{number}] output", output, first)
        check.dense(f"parts[{number}] output", output)
        check.shape(f"parts[{number}] lse", lse, first.shape[:3], "(B, T, H)")
        check.same(f"parts[{number}] lse", lse, first_lse)
