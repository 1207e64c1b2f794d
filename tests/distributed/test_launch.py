"""The processes that a pool starts: how they end, and what is said of it."""

from __future__ import annotations

import os
import re
import time

import pytest
import torch.distributed as dist

from causalrope_sp import ConfigError
from causalrope_sp.distributed.launch import run_ranks
from causalrope_sp.errors import RankLostError


def fail_on_the_last(group: dist.ProcessGroup, device: str) -> None:
    if group.rank() == group.size() - 1:
        raise ConfigError(f"the last rank is out of order at {time.time()}")
    dist.barrier()


def test_a_rank_that_fails_ends_the_others() -> None:
    with pytest.raises(RankLostError, match=r"rank 1 of 2 failed: (.|\n)*the last rank is out of order") as caught:
        run_ranks(fail_on_the_last, 2)
    failed = re.search(r"out of order at ([\d.]+)", str(caught.value))
    assert failed
    assert time.time() - float(failed[1]) < 30


def end_at_once(group: dist.ProcessGroup, device: str) -> None:
    if group.rank() == 1:
        os._exit(7)
    dist.barrier()


def test_a_rank_that_ends_is_told_with_its_status() -> None:
    with pytest.raises(RankLostError, match=r"rank 1 of 2 failed: it ended with status 7"):
        run_ranks(end_at_once, 2)


def add(group: dist.ProcessGroup | None, device: str, a: int, b: int) -> tuple[object, str, int]:
    return group, device, a + b


def test_one_rank_is_this_process() -> None:
    assert run_ranks(add, 1, 2, 3) == (None, "cpu", 5)
