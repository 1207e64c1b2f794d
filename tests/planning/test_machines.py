"""Which machine predictions assume for a device, and that ranks on GPUs that differ assume the same one."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from causalrope_sp import CausalVideoPipeline, SamplerConfig, SequenceParallel
from causalrope_sp.distributed.launch import RankPool
from causalrope_sp.distributed.layout import Layout, parse_strategy
from causalrope_sp.pipeline import loading, preflight
from causalrope_sp.planning import strategy
from causalrope_sp.planning.machines import CPU, H100, Machine, default_machine, machine, machine_of
from causalrope_sp.planning.strategy import common_machine
from causalrope_sp.planning.workload import Workload
from causalrope_sp.sampling.chunk_loop import ChunkLoop
from causalrope_sp.sampling.stream_options import StreamOptions
from tests.support.guided_runs import STREAM
from tests.support.sampler_cases import CONFIG, GRID, MODEL, noise_of, text

H200 = machine("h200", "nvlink")


@pytest.mark.parametrize(
    ("name", "gpu", "link"),
    [
        ("NVIDIA H200", "h200", "nvlink"),
        ("NVIDIA H100 80GB HBM3", "h100", "nvlink"),
        ("NVIDIA A100-SXM4-80GB", "a100", "nvlink"),
        ("NVIDIA A100-PCIE-40GB", "a100", "pcie"),
        ("NVIDIA H100 PCIe", "h100", "pcie"),
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


def test_an_unknown_gpu_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    machine_of.cache_clear()
    with caplog.at_level(logging.WARNING):
        for name in ("NVIDIA H200", "NVIDIA B200", "NVIDIA B200", "NVIDIA H300 PCIe"):
            machine_of(name)
    assert caplog.messages == [
        "NVIDIA B200 has no known rates: predictions assume h100, nvlink",
        "NVIDIA H300 PCIe has no known rates: predictions assume h100, pcie",
    ]


@contextmanager
def gpus_that_differ(parallel: SequenceParallel) -> Iterator[None]:
    """Rank 0 is on an H200, the others on H100s, while machines are asked for; tensors stay on the CPU."""
    own = H200 if parallel.rank == 0 else H100

    def on_a_gpu(group: SequenceParallel, everyone: bool = False) -> Machine:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(group, "device", torch.device("cuda", group.rank))
            return common_machine(group, everyone)

    def by_machine(workload: Any, machine: Machine, *_: Any) -> Layout:
        return parse_strategy("ulysses" if machine == H200 else "gather-kv", parallel.mesh.sp)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(strategy, "default_machine", lambda device: own)
        patch.setattr(preflight, "default_machine", lambda device: own)
        for module in (strategy, loading):
            patch.setattr(module, "common_machine", on_a_gpu)
            patch.setattr(module, "choose_strategy", by_machine)
        yield


def on_other_gpus(group: Any, device: str) -> bool:
    """All ranks plan with the machine of rank 0: for a stream, without the pipeline, and for a run, in which the last
    rank decodes."""
    parallel = SequenceParallel(group, device=device)
    with gpus_that_differ(parallel):
        work, sampler = Workload(CONFIG, GRID, 3, 2, 2), SamplerConfig((999.0, 400.0))
        given = parse_strategy("ulysses", parallel.mesh.sp) if parallel.rank else None  # to one rank alone
        planned = [strategy.layout_of_stream(work, parallel, layout).name for layout in (None, given)]
        loop = ChunkLoop(MODEL, text(1), noise_of(1), GRID, 4, parallel, StreamOptions(stream=STREAM, sampler=sampler))
        right = [planned == ["ulysses", "ulysses"], loop.layout.name == "ulysses"]
    parallel = SequenceParallel(group, device=device, decode_ranks=1)
    with gpus_that_differ(parallel):
        pipe = CausalVideoPipeline.from_pretrained("toybox", parallel=parallel)
        assert pipe.parts.run is not None
        right.append(pipe.parts.run.machine == H200)
    return parallel.everyone.all_say(all(right))


def test_ranks_whose_gpus_differ_plan_for_the_first_one(pool: RankPool) -> None:
    assert pool.run(on_other_gpus, 2)
