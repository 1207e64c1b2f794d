"""A group without a backend for the ranks' device, and two ranks on one GPU, are refused before anything is sent."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from causalrope_sp import ConfigError, SequenceParallel
from causalrope_sp.distributed import backends, group
from causalrope_sp.distributed.backends import check_backend
from causalrope_sp.distributed.launch import RankPool
from causalrope_sp.errors import RankLostError

CPU, GPU = torch.device("cpu"), torch.device("cuda", 1)
FOR_CPUS = (
    "group: expected gloo for ranks on CPUs, got a group without a backend for cpu (nccl for cuda): call "
    "init_process_group('gloo'), or give the rank's GPU as device"
)
FOR_GPUS = (
    "group: expected NCCL for ranks on GPUs, got {}: call init_process_group('nccl') or "
    "init_process_group('cpu:gloo,cuda:nccl')"
)


@pytest.mark.parametrize(
    ("config", "device", "message"),
    [
        ("cpu:gloo,cuda:gloo", GPU, FOR_GPUS.format("gloo")),
        ("cpu:gloo", GPU, FOR_GPUS.format("a group without a backend for cuda (gloo for cpu)")),
        ("cuda:nccl", CPU, FOR_CPUS),
        ("cpu:gloo,cuda:nccl", GPU, None),
        ("cuda:nccl", GPU, None),
        ("cpu:ucc,cuda:ucc", GPU, None),
        ("cpu:gloo,cuda:nccl", CPU, None),
        ("cpu:gloo,cuda:gloo", CPU, None),
    ],
)
def test_the_backend_of_the_device_decides(
    config: str, device: torch.device, message: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dist, "get_backend_config", lambda group: config)
    if message is None:
        return check_backend(None, device)  # type: ignore[arg-type]
    with pytest.raises(ConfigError) as caught:
        check_backend(None, device)  # type: ignore[arg-type]
    assert str(caught.value) == message


def as_with_gpus(patch: pytest.MonkeyPatch, uuid: str) -> None:
    patch.setattr(torch.cuda, "device_count", lambda: 2)
    patch.setattr(group, "attention_obstacle", lambda attention, device: None)
    patch.setattr(backends, "gpu_uuid", lambda device: uuid)


def refusal(work: Any) -> str:
    try:
        work()
    except ConfigError as error:
        return str(error)
    return "nothing"


def of_gloo(world: Any, device: str) -> list[str]:
    """What a group of gloo alone says of ranks on GPUs."""
    with pytest.MonkeyPatch.context() as patch:
        as_with_gpus(patch, f"GPU {world.rank()}")
        said = refusal(lambda: SequenceParallel(world, device=f"cuda:{world.rank()}"))
    return world_of(said)


def on_gpus(patch: pytest.MonkeyPatch, world: Any, uuid: str, **options: Any) -> str:
    """What is said to this rank on a GPU of one machine."""
    as_with_gpus(patch, uuid)
    patch.setattr(dist, "get_backend_config", lambda group: "cpu:gloo,cuda:nccl")
    try:
        return refusal(lambda: SequenceParallel(world, device="cuda:0", **options))
    except RankLostError as error:
        return f"lost: {error}"


def on_one_gpu(world: Any, device: str) -> list[list[str]]:
    """What is said of ranks 0 and 2 on one GPU, then with GPUs of their own, then with these exchanged."""
    told = []
    for number in (world.rank() % 2, world.rank(), 2 - world.rank()):
        with pytest.MonkeyPatch.context() as patch:
            told.append(on_gpus(patch, world, f"GPU {number}"))
    return world_of(told)


def before_all_have_come(world: Any, device: str) -> list[list[str]]:
    """What is said where rank 1 does not come, and then does."""
    told = ["is late"]
    dist.barrier(world)
    with pytest.MonkeyPatch.context() as patch:
        if world.rank() != 1:
            told = [on_gpus(patch, world, f"GPU {world.rank()}", timeout=timedelta(seconds=2))]
        dist.barrier(world)
        told.append(on_gpus(patch, world, f"GPU {world.rank()}"))
    return world_of(told)


def world_of(said: Any) -> list[Any]:
    """What every rank says."""
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, said)
    return gathered


def test_gloo_is_refused_on_gpus_by_every_rank(pool: RankPool) -> None:
    assert pool.run(of_gloo, 2) == [FOR_GPUS.format("gloo")] * 2


def test_two_ranks_on_one_gpu_are_refused_on_every_rank_and_only_then(pool: RankPool) -> None:
    shared = (
        "ranks 0 and 2 compute on one GPU, cuda:0 of rank 0: give every rank of a machine its own, such as "
        "device=f'cuda:{LOCAL_RANK}'"
    )
    assert pool.run(on_one_gpu, 3) == [[shared, "nothing", "nothing"]] * 3


def test_a_rank_that_does_not_come_is_named_and_may_come_later(pool: RankPool) -> None:
    lost = (
        "lost: rank 1 did not come within 2 s to tell on which GPU it computes: every rank must make its group, on a "
        "GPU"
    )
    assert pool.run(before_all_have_come, 3) == [[lost, "nothing"], ["is late", "nothing"], [lost, "nothing"]]
