"""`auto` measures the device alone: on a simulated GPU, with clocks for the host and for the device's queue."""

from __future__ import annotations

import time

import pytest
import torch

from causalrope_kernels.attention_choice import CLOCK, LONGEST_SLEEP_S, RUNS, median_milliseconds

LAUNCH, WORK = 4e-4, 1e-4  # seconds of the host and of the device


class SimulatedGPU:
    """Attributes: launches: the host's seconds for the next launches; `LAUNCH` for those after them. slept: the seconds
    of every sleep."""

    def __init__(self, clock: float = CLOCK) -> None:
        self.host = self.queue_ends = 0.0
        self.clock = clock
        self.launches: list[float] = []
        self.slept: list[float] = []

    def run(self) -> None:
        self.host += self.launches.pop(0) if self.launches else LAUNCH
        self.work(WORK)

    def work(self, seconds: float) -> None:
        self.queue_ends = max(self.host, self.queue_ends) + seconds

    def sleep(self, cycles: int) -> None:
        self.slept.append(cycles / self.clock)
        self.work(self.slept[-1])

    def synchronize(self) -> None:
        self.host = max(self.host, self.queue_ends)


def measured(gpu: SimulatedGPU, monkeypatch: pytest.MonkeyPatch) -> float:
    """The median in seconds."""

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = max(gpu.host, gpu.queue_ends)

        def query(self) -> bool:
            return gpu.host >= self.at

        def elapsed_time(self, other: Event) -> float:
            return 1e3 * (other.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", gpu.synchronize)
    monkeypatch.setattr(torch.cuda, "_sleep", gpu.sleep)
    monkeypatch.setattr(time, "perf_counter", lambda: gpu.host)
    return median_milliseconds(gpu.run) / 1e3


@pytest.mark.parametrize("clock", [CLOCK, 1.2e9], ids=["the fastest GPU", "a slow GPU"])
def test_a_launch_that_takes_longer_than_its_work_does_not_count(clock: float, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = SimulatedGPU(clock)
    assert measured(gpu, monkeypatch) == pytest.approx(WORK)
    assert len(gpu.slept) == 1


def test_a_sleep_that_was_too_short_is_noticed_and_lengthened_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Launches take longer than the one before them, by which the sleep is chosen."""
    gpu = SimulatedGPU()
    gpu.launches = [LAUNCH, LAUNCH, *[3 * LAUNCH] * 2 * RUNS]
    assert measured(gpu, monkeypatch) == pytest.approx(WORK)
    assert gpu.slept[1:] == [pytest.approx(4 * gpu.slept[0])]


def test_one_slow_launch_does_not_let_the_device_sleep_long(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = SimulatedGPU()
    gpu.launches = [LAUNCH, 1.0]
    assert measured(gpu, monkeypatch) == pytest.approx(WORK)
    assert gpu.slept == [pytest.approx(LONGEST_SLEEP_S)]
