"""Groups of some ranks, made by ranks that had different numbers of groups before."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from causalrope_sp import CausalVideoPipeline, SequenceParallel
from causalrope_sp.distributed.launch import RankPool
from causalrope_sp.distributed.subgroup import subgroup
from causalrope_sp.errors import RankLostError
from tests.support.videos import video_of

MINUTE = timedelta(minutes=1)


def total(group: Any, ranks: list[int], number: float) -> float:
    """The sum of a number over the ranks of a new subgroup."""
    summed = torch.tensor(number)
    dist.all_reduce(summed, group=subgroup(group, ranks, None, MINUTE))
    return summed.item()


def sums(group: Any, device: str) -> list[float]:
    """Groups that overlap, some of them made twice, one after another group was destroyed."""
    rank = group.rank()
    found = [total(group, ranks, rank) for ranks in ([0, 1, 2], [0, 1], [0, 2], [2, 3], [1, 3]) if rank in ranks]
    if rank == 0:
        dist.destroy_process_group(subgroup(group, [0], None, MINUTE))
    return found + [total(group, ranks, rank) for ranks in ([0, 1], [0, 3], [0, 1, 2, 3]) if rank in ranks]


def test_ranks_with_different_numbers_of_groups_find_one_another(pool: RankPool) -> None:
    assert pool.run(sums, 4) == [3, 1, 2, 1, 3, 6]


def downwards(group: Any, device: str) -> list[int]:
    """The numbers of the ranks, as ranks of a group that counts downwards and of its subgroup see them."""
    outer = dist.new_group([2, 1, 0], sort_ranks=False)
    inner = subgroup(outer, [0, 2], None, MINUTE) if outer.rank() != 1 else None
    return dist.get_process_group_ranks(inner) if inner is not None else []


def test_ranks_are_numbered_as_the_group_numbers_them(pool: RankPool) -> None:
    assert pool.run(downwards, 3) == [2, 0]


def late(group: Any, device: str) -> float:
    """Rank 0 gives up and calls again; rank 1 comes once, after that."""
    if group.rank():
        time.sleep(1.5)
    else:
        with pytest.raises(RankLostError, match=r"^rank 1 did not come within 0\.5 s to make the group of ranks 0, 1$"):
            subgroup(group, [0, 1], None, timedelta(seconds=0.5))
    return total(group, [0, 1], 1)


def test_a_rank_that_is_late_is_named_and_can_still_come(pool: RankPool) -> None:
    assert pool.run(late, 2) == 2


def two_pipelines(group: Any, device: str) -> Any:
    """The video of a pipeline made after one whose last rank only decodes."""
    for options in ({"decode_ranks": 1}, {"strategy": "ulysses2xshard-kv2"}):
        parallel = SequenceParallel(group, device=device, timeout=MINUTE, **options)
        pipe = CausalVideoPipeline.from_pretrained("toybox", parallel=parallel)
        video = video_of(pipe, "a red circle slides right", num_frames=9, seed=1)
    return video


def test_a_product_strategy_after_decode_ranks_does_not_wait_for_ever(pool: RankPool) -> None:
    pipe = CausalVideoPipeline.from_pretrained("toybox")
    expected = video_of(pipe, "a red circle slides right", num_frames=9, seed=1)
    video = pool.run(two_pipelines, 4)
    assert abs(video.astype(int) - expected).max() <= 1
