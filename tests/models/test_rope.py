"""Rotation by the global index, against complex numbers worked out token by token."""

from __future__ import annotations

import cmath

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from causalrope_kernels.reference import rotate
from causalrope_sp import LatentGrid
from causalrope_sp.grid import Shard
from causalrope_sp.models.rope import RotaryTables
from tests.support.streams import global_indices

THETA = 10000.0


def tables(head_dim: int, shard: Shard, dtype: torch.dtype = torch.float64, theta: float = THETA) -> RotaryTables:
    return RotaryTables(head_dim, theta, shard, torch.device("cpu"), dtype)


def rotate_on_read(x_BTHD: Tensor, rope: RotaryTables, frames: list[int]) -> Tensor:
    return rotate(x_BTHD, *rope.rotation(frames).of_queries)


def angles(g: int, grid: LatentGrid, head_dim: int, theta: float) -> list[float]:
    """The angle of every channel pair of the token with global index g, from the formulas alone."""
    t, y, x = g // grid.tokens, g % grid.tokens // grid.columns, g % grid.tokens % grid.columns
    space = 2 * (head_dim // 6)
    widths = [(t, head_dim - 2 * space), (y, space), (x, space)]
    return [place / theta ** (2 * i / width) for place, width in widths for i in range(width // 2)]


def turn_by_hand(x_BTHD: Tensor, indices: list[int], grid: LatentGrid, theta: float) -> Tensor:
    turns = [[cmath.exp(1j * angle) for angle in angles(g, grid, x_BTHD.shape[-1], theta)] for g in indices]
    pairs = torch.view_as_complex(x_BTHD.unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * torch.tensor(turns, dtype=torch.complex128).unsqueeze(1)).flatten(-2)


@st.composite
def passes(draw: st.DrawFn) -> tuple[Shard, list[int]]:
    grid = LatentGrid(draw(st.integers(1, 5)), draw(st.integers(1, 5)))
    ranks = draw(st.integers(1, grid.tokens))
    frames = st.integers(0, 30) | st.integers(1000, 3000)
    return Shard(grid, draw(st.integers(0, ranks - 1)), ranks), draw(st.lists(frames, min_size=1, max_size=4))


@given(passes(), st.sampled_from([6, 8, 10, 12, 16, 32]), st.sampled_from([THETA, 50.0]))
@settings(deadline=None, max_examples=40)
def test_rotation_is_complex_multiplication_by_global_index(
    a_pass: tuple[Shard, list[int]], head_dim: int, theta: float
) -> None:
    shard, frames = a_pass
    indices = [g for frame in frames for g in global_indices(shard, frame)]
    x = torch.randn(2, len(indices), 3, head_dim, dtype=torch.float64)
    expected = turn_by_hand(x, indices, shard.grid, theta)
    torch.testing.assert_close(
        rotate_on_read(x, tables(head_dim, shard, theta=theta), frames), expected, rtol=0, atol=1e-11
    )


def test_wan_splits_its_head_into_22_21_21_pairs() -> None:
    rotation = tables(128, Shard(LatentGrid(2, 2))).rotation([1, 2])
    t, y, x = rotation.of_queries[0].unflatten(0, (2, 4)).split([22, 21, 21], -1)
    assert (t[0] == t[0, :1]).all()
    assert (t[0] != t[1]).any(0).all()
    assert torch.equal(y[0], y[1])
    assert torch.equal(y[0, 0], y[0, 1])
    assert not torch.equal(y[0, 0], y[0, 2])
    assert torch.equal(x[0, 0], x[0, 2])
    assert not torch.equal(x[0, 0], x[0, 1])


@given(passes())
@settings(deadline=None, max_examples=40)
def test_a_shard_rotates_as_its_slice_of_the_whole(a_pass: tuple[Shard, list[int]]) -> None:
    shard, frames = a_pass
    x = torch.randn(1, len(frames), shard.grid.tokens, 2, 12, dtype=torch.float64)
    whole = rotate_on_read(x.flatten(1, 2), tables(12, Shard(shard.grid)), frames).view(x.shape)
    mine = rotate_on_read(x[:, :, shard.start : shard.stop].flatten(1, 2), tables(12, shard), frames)
    assert torch.equal(mine, whole[:, :, shard.start : shard.stop].flatten(1, 2))


def test_tables_grow_and_change_nothing_that_was_there() -> None:
    shard = Shard(LatentGrid(2, 3), 1, 2)
    grown = tables(12, shard)
    asked = [[0, 1, 2], [70, 3], [63, 64, 65], [1023, 1024, 1025], [5000, 0, 4999], [0, 1, 2]]
    for frames in asked:
        fresh = tables(12, shard).rotation(frames).of_queries
        for mine, other in zip(grown.rotation(frames).of_queries, fresh, strict=True):
            assert mine.shape == (len(frames) * shard.tokens, 6)
            assert torch.equal(mine, other)


@pytest.mark.parametrize("frame", [1024, 100_000])
def test_far_frames_keep_their_precision_in_float32(frame: int) -> None:
    """The angles themselves are made in float64; in float32 they would be off by 1e-3 here."""
    shard = Shard(LatentGrid(2, 2))
    cos, sin = tables(12, shard, torch.float32).rotation([frame]).of_queries
    exact = torch.tensor([angles(g, shard.grid, 12, THETA) for g in global_indices(shard, frame)], dtype=torch.float64)
    assert cos.dtype == sin.dtype == torch.float32
    torch.testing.assert_close(cos.double(), exact.cos(), rtol=0, atol=1e-7)
    torch.testing.assert_close(sin.double(), exact.sin(), rtol=0, atol=1e-7)


@given(st.integers(0, 50), st.integers(0, 50), st.integers(1, 3000))
@settings(deadline=None, max_examples=30)
def test_scores_depend_on_differences_of_time_alone(query: int, key: int, later: int) -> None:
    shard = Shard(LatentGrid(2, 3))
    rope = tables(12, shard)
    q, k = torch.randn(2, 1, shard.tokens, 2, 12, dtype=torch.float64)

    def scores(shift: int) -> Tensor:
        return torch.einsum(
            "bqhd,bkhd->bhqk", rotate_on_read(q, rope, [query + shift]), rotate_on_read(k, rope, [key + shift])
        )

    torch.testing.assert_close(scores(later), scores(0), rtol=0, atol=1e-10)
    if query != key:
        moved = torch.einsum("bqhd,bkhd->bhqk", rotate_on_read(q, rope, [query]), rotate_on_read(k, rope, [query]))
        assert not torch.allclose(moved, scores(0), atol=1e-3)
