"""Groups of some ranks, made by ranks that had different numbers of groups before."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from causalrope_sp import CausalVideoPipeline, SequenceParallel
from causalrope_sp.distributed.launch import RankPool
from causalrope_sp.distributed.subgroup import subgroup
from tests.support.videos import video_of

MINUTE = timedelta(minutes=1)


def sums(group: Any, device: str) -> list[float]:
    """Groups that overlap, some of them twice: what all-reduce of the rank's number adds up in those of this rank."""
    found = []
    for ranks in ([0, 1, 2], [0, 1], [0, 2], [2, 3], [1, 3], [0, 1], [0, 3], [0, 1, 2, 3]):
        if group.rank() in ranks:
            number = torch.tensor(float(group.rank()))
            dist.all_reduce(number, group=subgroup(group, ranks, None, MINUTE))
            found.append(number.item())
    return found


def test_ranks_with_different_numbers_of_groups_find_one_another(pool: RankPool) -> None:
    assert pool.run(sums, 4) == [3, 1, 2, 1, 3, 6]


def two_pipelines(group: Any, device: str) -> Any:
    """The video of a pipeline made after one whose last rank only decodes."""
    for options in ({"decode_ranks": 1}, {"strategy": "ulysses2xshard-kv2"}):
        parallel = SequenceParallel(group, device=device, **options)
        pipe = CausalVideoPipeline.from_pretrained("toybox", parallel=parallel)
        video = video_of(pipe, "a red circle slides right", num_frames=9, seed=1)
    return video


def test_a_product_strategy_after_decode_ranks_does_not_wait_for_ever(pool: RankPool) -> None:
    expected = video_of(
        CausalVideoPipeline.from_pretrained("toybox"), "a red circle slides right", num_frames=9, seed=1
    )
    video = pool.run(two_pipelines, 4)
    assert abs(video.astype(int) - expected).max() <= 1
