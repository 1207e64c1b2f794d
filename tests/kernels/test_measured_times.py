"""`auto` measures the device alone: on a simulated GPU, with clocks for the host and for the device's queue."""

from __future__ import annotations

import time

import pytest
import torch

from causalrope_kernels.attention_choice import CLOCK, median_milliseconds

LAUNCH, WORK = 4e-4, 1e-4  # seconds of the host and of the device


class SimulatedGPU:
    def __init__(self) -> None:
        self.host = self.queue_ends = 0.0

    def run(self) -> None:
        self.host += LAUNCH
        self.work(WORK)

    def work(self, seconds: float) -> None:
        self.queue_ends = max(self.host, self.queue_ends) + seconds

    def synchronize(self) -> None:
        self.host = max(self.host, self.queue_ends)


def test_a_launch_that_takes_longer_than_its_work_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = SimulatedGPU()

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = max(gpu.host, gpu.queue_ends)

        def elapsed_time(self, other: Event) -> float:
            return 1e3 * (other.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", gpu.synchronize)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: gpu.work(cycles / CLOCK))
    monkeypatch.setattr(time, "perf_counter", lambda: gpu.host)
    assert median_milliseconds(gpu.run) == pytest.approx(1e3 * WORK)
