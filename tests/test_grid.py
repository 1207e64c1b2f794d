"""The global time index by brute force: shards, chunks, tokens."""

from __future__ import annotations

import itertools
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from causalrope_sp import Chunk, ConfigError, LatentGrid
from causalrope_sp.grid import Shard, split_into_chunks
from tests.support.streams import global_indices

grids = st.builds(LatentGrid, rows=st.integers(1, 12), columns=st.integers(1, 12))


@st.composite
def sharded_grids(draw: st.DrawFn) -> tuple[LatentGrid, list[Shard]]:
    grid = draw(grids)
    ranks = draw(st.integers(1, grid.tokens))
    return grid, [Shard(grid, rank, ranks) for rank in range(ranks)]


@given(sharded_grids(), st.integers(0, 10**9))
@settings(deadline=None)
def test_shards_partition_every_frame(sharded: tuple[LatentGrid, list[Shard]], frame: int) -> None:
    grid, shards = sharded
    owned = [g for shard in shards for g in global_indices(shard, frame)]
    assert owned == list(range(frame * grid.tokens, (frame + 1) * grid.tokens))
    sizes = [shard.tokens for shard in shards]
    assert [len(global_indices(shard, frame)) for shard in shards] == sizes
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] - sizes[-1] <= 1 <= sizes[-1]
    assert shards[-1].all == tuple(shards)


@given(sharded_grids(), st.integers(0, 40))
@settings(deadline=None)
def test_rows_and_columns_agree_with_the_global_index(sharded: tuple[LatentGrid, list[Shard]], frame: int) -> None:
    grid, shards = sharded
    raster = itertools.product(range(grid.rows), range(grid.columns))
    place_of = dict(zip(itertools.count(frame * grid.tokens), raster))
    for shard in shards:
        y, x = shard.rows_and_columns()
        assert [place_of[g] for g in global_indices(shard, frame)] == list(zip(y.tolist(), x.tolist()))


@pytest.mark.parametrize(("ranks", "sizes"), [(8, [195] * 8), (7, [223] * 6 + [222]), (1, [1560])])
def test_shards_of_wan_at_480p(ranks: int, sizes: list[int]) -> None:
    grid = LatentGrid.from_pixels(480, 832, 8)
    assert (grid.rows, grid.columns, grid.latent_height, grid.latent_width) == (30, 52, 60, 104)
    assert [shard.tokens for shard in Shard(grid, 0, ranks).all] == sizes


@given(
    frames=st.integers(0, 40),
    chunk_frames=st.integers(1, 7),
    lone=st.booleans(),
    index=st.integers(0, 5),
    start=st.integers(0, 20),
)
@settings(deadline=None)
def test_chunks_cover_time_exactly(frames: int, chunk_frames: int, lone: bool, index: int, start: int) -> None:
    chunks = list(split_into_chunks(frames, chunk_frames, independent_first_frame=lone, index=index, start=start))
    assert [t for chunk in chunks for t in range(chunk.start, chunk.stop)] == list(range(start, start + frames))
    assert [chunk.index for chunk in chunks] == list(range(index, index + len(chunks)))
    sizes = [chunk.frames for chunk in chunks]
    if lone and start == 0 and sizes:
        assert sizes.pop(0) == 1
    assert all(size == chunk_frames for size in sizes[:-1])
    assert all(1 <= size <= chunk_frames for size in sizes)


@given(chunk_frames=st.integers(1, 5), lone=st.booleans(), taken=st.integers(1, 30))
@settings(deadline=None)
def test_endless_chunks_begin_like_a_finite_video(chunk_frames: int, lone: bool, taken: int) -> None:
    endless = split_into_chunks(None, chunk_frames, independent_first_frame=lone)
    finite = split_into_chunks(taken * chunk_frames, chunk_frames, independent_first_frame=lone)
    assert list(itertools.islice(endless, taken)) == list(itertools.islice(finite, taken))


@given(
    rows=st.integers(1, 4),
    columns=st.integers(1, 4),
    patch=st.sampled_from([(1, 1), (2, 2), (1, 2), (3, 2)]),
    batch=st.integers(1, 2),
    frames=st.integers(1, 3),
    channels=st.integers(1, 3),
)
@settings(deadline=None)
def test_a_token_holds_its_patch(
    rows: int, columns: int, patch: tuple[int, int], batch: int, frames: int, channels: int
) -> None:
    grid = LatentGrid(rows, columns, patch)
    shape = (batch, frames, channels, grid.latent_height, grid.latent_width)
    latents = torch.arange(torch.Size(shape).numel()).view(shape)
    tokens = grid.patchify(latents)
    assert tokens.shape == (batch, frames, grid.tokens, patch[0] * patch[1] * channels)
    assert torch.equal(grid.unpatchify(tokens), latents)
    for y, x in itertools.product(range(rows), range(columns)):
        corner = latents[..., y * patch[0] : (y + 1) * patch[0], x * patch[1] : (x + 1) * patch[1]]
        by_place_then_channel = corner.permute(0, 1, 3, 4, 2).flatten(2)
        assert torch.equal(tokens[:, :, y * columns + x], by_place_then_channel)


@given(size=st.integers(-40, 2000), step=st.sampled_from([(8, 2), (8, 1), (4, 3)]), tall=st.booleans())
@settings(deadline=None)
def test_sizes_that_do_not_divide_name_the_nearest_that_do(size: int, step: tuple[int, int], tall: bool) -> None:
    stride, patch = step
    whole = stride * patch

    def make(odd: int) -> LatentGrid:
        return LatentGrid.from_pixels(*((odd, whole) if tall else (whole, odd)), stride, (patch, patch))

    if size > 0 and size % whole == 0:
        assert make(size).tokens == size // whole
        return
    with pytest.raises(ConfigError, match="height" if tall else "width") as caught:
        make(size)
    assert "\n" not in str(caught.value)
    if size > 0:
        named = [int(word) for word in re.findall(r"\d+", str(caught.value).split("work:")[1])]
        assert named == [n for n in range(size - whole + 1, size + whole) if n > 0 and n % whole == 0]
        assert all(make(near).tokens == near // whole for near in named)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: LatentGrid(0, 4), "0×4"),
        (lambda: LatentGrid(3, -1), "3×-1"),
        (lambda: LatentGrid.from_latent(5, 4), "5×4"),
        (lambda: LatentGrid.from_latent(4, 6, (2, 4)), "4×6"),
        (lambda: LatentGrid.from_pixels(0, 16, 8), "height 0"),
        (lambda: Shard(LatentGrid(2, 3), 0, 7), "7 ranks .* 6 tokens"),
        (lambda: Shard(LatentGrid(2, 3), 2, 2), "rank 2"),
        (lambda: Shard(LatentGrid(2, 3), -1, 2), "rank -1"),
        (lambda: Shard(LatentGrid(2, 3), 0, 0), "rank 0"),
        (lambda: Chunk(0, 0, 0), "0 frames"),
        (lambda: Chunk(0, -1, 3), "from -1"),
        (lambda: Chunk(-1, 0, 3), "chunk -1"),
    ],
)
def test_what_cannot_be_is_one_clear_line(make: object, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        make()  # type: ignore[operator]
    assert "\n" not in str(caught.value)
