"""Which machine predictions assume for a device, and that ranks on GPUs that differ assume the same one."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from causalrope_sp import SequenceParallel
from causalrope_sp.distributed.launch import RankPool
from causalrope_sp.planning import strategy
from causalrope_sp.planning.machines import CPU, H100, default_machine, machine
from causalrope_sp.planning.strategy import common_machine


@pytest.mark.parametrize(
    ("name", "gpu", "link"),
    [
        ("NVIDIA H200", "h200", "nvlink"),
        ("NVIDIA H100 80GB HBM3", "h100", "nvlink"),
        ("NVIDIA A100-SXM4-80GB", "a100", "nvlink"),
        ("NVIDIA A100-PCIE-40GB", "a100", "nvlink"),
        ("NVIDIA A800-SXM4-80GB", "a800", "nvlink-a800"),
        ("NVIDIA L40S", "l40s", "pcie"),
        ("NVIDIA GeForce RTX 4090", "rtx4090", "pcie"),
        ("NVIDIA GeForce RTX 4090 D", "rtx4090", "pcie"),
        ("NVIDIA RTX A1000", "h100", "nvlink"),
        ("NVIDIA GH200 480GB", "h100", "nvlink"),
    ],
)
def test_a_gpu_is_known_by_its_name_and_has_its_own_memory(
    name: str, gpu: str, link: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=42 << 30))
    found, expected = default_machine(torch.device("cuda", 0)), machine(gpu, link)
    assert found.memory == 42 << 30
    assert replace(found, memory=expected.memory) == expected


def test_without_a_gpu_it_is_a_cpu() -> None:
    assert default_machine(torch.device("cpu")) == CPU


def on_other_gpus(group: Any, device: str) -> bool:
    """Rank 0 is on an H200, the others on H100s."""
    parallel = SequenceParallel(group, device=device)
    own = machine("h200", "nvlink") if parallel.rank == 0 else H100
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(strategy, "default_machine", lambda device: own)
        parallel.device = torch.device("cuda", parallel.rank)
        found = common_machine(parallel)
    return parallel.everyone.all_say(found == machine("h200", "nvlink"))


def test_ranks_whose_gpus_differ_plan_for_the_first_one(pool: RankPool) -> None:
    assert pool.run(on_other_gpus, 3)
