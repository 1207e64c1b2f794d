"""A stream that was saved goes on as if nothing had been, on the same ranks bit for bit, and on others to rounding."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from causalrope_sp import ConfigError, SequenceParallel, StreamConfig
from causalrope_sp.attention.build import build_strategy, stored_part
from causalrope_sp.checks import shown
from causalrope_sp.distributed.launch import RankPool
from causalrope_sp.distributed.layout import parse_strategy, strategies
from causalrope_sp.grid import LatentGrid
from causalrope_sp.heads import HeadPolicy
from causalrope_sp.heads.rings import HeadRings
from causalrope_sp.sessions import read_session, write_session
from tests.support.saved_loops import (
    Case,
    cases,
    go_on,
    name_of,
    resumed_elsewhere,
    saved_and_resumed,
    some_cases,
    strategies_of,
    uninterrupted,
)
from tests.support.steered_runs import STREAMS, by_lists
from tests.support.strategy_runs import HEADS, relative

SINGLE = SequenceParallel.single(device="cpu")


@pytest.fixture(scope="module")
def folder(pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every case as one rank saves it."""
    home = tmp_path_factory.mktemp("saved")
    (home / "1").mkdir()
    for case in cases():
        expected = uninterrupted(home / "1", SINGLE, case)
        found = go_on(home / "1" / name_of(case), SINGLE, case)
        if case[3]:
            assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True)), case
    return home


@pytest.fixture(scope="module")
def judge() -> dict[Case, list[Tensor]]:
    """What plain lists make of each case; without the cache the window is computed anew."""
    found = {}
    for case in cases():
        stream, script, number, cache = case
        found[case] = by_lists(stream, script, None if cache else number)
    return found


def check(found: dict[tuple[str, Case], list[Tensor]], judge: dict[Case, list[Tensor]]) -> None:
    for (strategy, case), chunks in found.items():
        for chunk, expected in zip(chunks, judge[case][-len(chunks) :], strict=True):
            assert relative(chunk, expected) < 1e-11, (strategy, case)


def test_one_rank_goes_on_with_what_it_saved(folder: Path, judge: dict[Case, list[Tensor]]) -> None:
    check({("one", case): go_on(folder / "1" / name_of(case), SINGLE, case) for case in cases()}, judge)


@pytest.mark.parametrize("policy", [HEADS, HeadPolicy(((3,) * 6,) * 2)], ids=["windows", "the same few frames"])
def test_a_file_has_the_frames_that_heads_see_alone(
    policy: HeadPolicy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that has all frames for every head is refused, and so are other windows of heads."""
    monkeypatch.setitem(STREAMS, "of heads", StreamConfig(7, 1, 2, heads=policy))
    case = "of heads", "new text, sink too", 6, True
    expected, file, other = uninterrupted(tmp_path, SINGLE, case), tmp_path / name_of(case), tmp_path / "other"
    saved = read_session(file)
    cache = saved.cache
    assert cache is not None
    (branch,) = cache.branches
    seen = {None: 5, 4: 2, 3: 1, 0: 0}  # by window: the sink, and but for 2 frames of the next chunk the newest ones
    heads = [[seen[window] for window in layer] for layer in policy.windows]
    assert branch.frames == (0, 4, 5, 6, 7)
    assert [cache.stored_shape(branch, layer)[2] for layer in range(2)] == [sum(layer) for layer in heads]
    layers = [cache.layer(branch.name, layer) for layer in range(2)]
    assert [layer.abs().sum((0, 1, 3, 5)).count_nonzero(0).tolist() for layer in layers] == heads
    whole = replace(cache, branches=(replace(branch, seen=()),), kinds=())
    write_session(other, replace(saved, cache=whole), layers)
    assert other.stat().st_size - file.stat().st_size > sum(layer.nbytes for layer in layers) / 3
    assert all(torch.equal(*both) for both in zip(go_on(file, SINGLE, case), expected, strict=True))
    with pytest.raises(ConfigError, match=re.escape("the saved cache holds the frames () for heads of the kinds ()")):
        go_on(other, SINGLE, case)
    monkeypatch.setitem(STREAMS, "of heads", StreamConfig(7, 1, 2, heads=HeadPolicy(((4,) * 6,) * 2)))
    others = f"those of ((0, 4),) for {((0,) * 6,) * 2}"
    says = f"the saved cache holds the frames {shown(branch.seen)} for heads of the kinds {shown(cache.kinds)}, but the"
    with pytest.raises(ConfigError, match=re.escape(f"{says} stream's windows of heads {others}")):
        go_on(file, SINGLE, case)


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_ranks_go_on_with_what_they_and_others_saved(
    pool: RankPool, folder: Path, judge: dict[Case, list[Tensor]], ranks: int
) -> None:
    """With every strategy; one rank goes on with theirs."""
    same = pool.run(saved_and_resumed, ranks, folder)
    assert same
    assert [key for key, equal in same.items() if not equal] == []
    check(pool.run(resumed_elsewhere, ranks, folder / "1", ranks), judge)
    for turn, strategy in enumerate(strategies_of(ranks)):
        saved = folder / f"{ranks}-{strategy}"
        check({(strategy, case): go_on(saved / name_of(case), SINGLE, case) for case in some_cases(turn)}, judge)
    if ranks == 3:
        check(pool.run(resumed_elsewhere, 2, saved, turn), judge)  # of the last strategy


@pytest.mark.parametrize("ranks", range(1, 7))
def test_the_stored_parts_of_all_ranks_are_everything(ranks: int) -> None:
    grid, heads = LatentGrid(3, 5), 6
    for name in strategies(ranks, heads):
        layout, covered = parse_strategy(name, ranks), torch.zeros(grid.tokens, heads, dtype=torch.int64)
        (placement,) = HeadRings.of(None, 1, heads, layout.ulysses, 4).placements
        for rank in range(ranks):
            tokens, column = stored_part(layout, grid, rank)
            covered[tokens, list(placement.columns[column])] += 1
        assert (covered == (layout.sharing if layout.inner == "gather-kv" else 1)).all(), name


def check_stored_parts(group: dist.ProcessGroup, device: str) -> int:
    grid, names = LatentGrid(3, 5), strategies(4, 6)
    for name in names:
        parallel, layout = SequenceParallel(group, name, device), parse_strategy(name, 4)
        rings = HeadRings.of(None, 1, 6, layout.ulysses, 4)
        strategy = build_strategy(parallel, layout, grid, rings)
        tokens, column = stored_part(layout, grid, parallel.sp_rank)
        sizes = tokens.stop - tokens.start, rings.placements[0].sizes[column]
        assert sizes == (strategy.stored_tokens, strategy.stored_heads), (name, parallel.rank)
    return len(names)


def test_stored_parts_are_as_large_as_what_the_strategies_cache(pool: RankPool) -> None:
    assert pool.run(check_stored_parts, 4) == 5
