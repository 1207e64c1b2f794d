"""The names of strategies, the layouts that they stand for, and the group of one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from causalrope_sp import ConfigError, LatentGrid
from causalrope_sp.distributed import SequenceParallel, strategies
from causalrope_sp.distributed.layout import check_head_groups, parse_strategy
from causalrope_sp.planning.counts import cache_bytes
from causalrope_sp.planning.machines import default_machine
from causalrope_sp.planning.strategy import choose_strategy
from causalrope_sp.planning.workload import Workload
from tests.support.strategy_runs import CONFIG, WORK


@pytest.mark.parametrize("ranks", range(1, 13))
@pytest.mark.parametrize("heads", [1, 5, 12])
def test_every_strategy_that_is_named_is_one(ranks: int, heads: int) -> None:
    grid = LatentGrid(5, 5)
    for name in strategies(ranks, heads):
        layout = parse_strategy(name, ranks)
        layout.check(heads)
        assert layout.ulysses * layout.sharing == layout.ranks == ranks
        assert sum(layout.heads(heads)) == heads
        assert max(layout.heads(heads)) - min(layout.heads(heads)) <= 1
        work = Workload(replace(CONFIG, dim=12 * heads, num_heads=heads), grid, 4, 2, 2)
        held = sum(cache_bytes(layout, work, rank) for rank in range(ranks))
        copies = layout.sharing if layout.inner == "gather-kv" else 1
        assert held == copies * cache_bytes(parse_strategy("ulysses", 1), work, 0)


def test_one_process_is_a_group_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    for parallel in (SequenceParallel.single(device="cpu"), SequenceParallel.from_env("ulysses", device="cpu")):
        layout = choose_strategy(WORK, default_machine(parallel.device), parallel)
        assert (parallel.rank, parallel.size, layout.name) == (0, 1, "single")
        assert parallel.shard(LatentGrid(2, 3)).tokens == 6
        parallel.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strategy": 3}, "strategy must be a text that is not empty, not 3"),
        ({"device": "gpu"}, "device must be one that torch knows, such as cpu or cuda:0, not 'gpu'"),
        ({"head_groups": "x"}, "head_groups must be a whole number of at least 1, not 'x'"),
        ({"head_groups": True}, "head_groups must be a whole number of at least 1, not True"),
        ({"head_groups": 0}, "head_groups must be a whole number of at least 1, not 0"),
        ({"overlap": "no"}, "overlap must be True or False, not 'no'"),
        ({"attention": 3}, "attention must be one of auto, .*, not 3"),
        ({"cfg": "x"}, "cfg must be a whole number of at least 1, not 'x'"),
    ],
)
def test_a_wrong_argument_of_a_group_is_one_sentence(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        SequenceParallel.single(**{"device": "cpu"} | options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("groups", "strategy", "ranks", "said"),
    [
        (99, "auto", 1, r"head_groups must be at most 12, the heads of a rank \(12 heads, 1 ranks\), not 99"),
        (3, "ulysses", 5, r"head_groups must be at most 2, the heads of a rank \(12 heads, 5 ranks\), not 3"),
        (2, "auto", 13, r"head_groups must be at most 1, the heads"),
        (2, "gather-kv", 2, "head_groups must be 1 with strategy gather-kv, which does not send heads, not 2"),
        (2, "ulysses2xshard-kv2", 4, "head_groups must be 1 with strategy ulysses2xshard-kv2"),
    ],
)
def test_head_groups_that_no_rank_has_are_refused(groups: int, strategy: str, ranks: int, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        check_head_groups(groups, strategy, ranks, 12)
    check_head_groups(1, strategy, ranks, 12)
    with pytest.raises(ConfigError, match="head_groups must be at most 6, the heads of a rank"):
        SequenceParallel.single(device="cpu", head_groups=7).check(LatentGrid(2, 3), 6)


@pytest.mark.parametrize("seconds", [0, float("nan"), "x", None, 1e9])
def test_a_wrong_timeout_is_one_sentence(seconds: Any) -> None:
    with pytest.raises(ConfigError, match=r"a timeout must be above 0 and at most 1e\+06 seconds, not "):
        SequenceParallel.from_env(device="cpu", timeout_s=seconds)


def test_unknown_strategies_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"unknown strategy 'ring'; there are: auto, ulysses, gather-kv, shard-kv"):
        SequenceParallel.single("ring")
