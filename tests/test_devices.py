"""A GPU has an index wherever the library keeps it, and events belong to the GPU that is asked about."""

from __future__ import annotations

import ast
from typing import Any

import pytest
import torch

from causalrope_sp import CausalVideoPipeline, SequenceParallel
from causalrope_sp.devices import check_device, own_device, recorded_event
from causalrope_sp.distributed import group
from tests.support.paths import ROOT


@pytest.fixture
def second_of_two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of two GPUs, of which the second is the current one."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(group, "attention_obstacle", lambda attention, device: None)


@pytest.mark.usefixtures("second_of_two_gpus")
def test_cuda_is_the_current_gpu() -> None:
    for given, index in (("cuda", 1), (torch.device("cuda"), 1), ("cuda:0", 0), ("cuda:1", 1)):
        assert own_device(given) == SequenceParallel.single(device=given).device == torch.device("cuda", index)
    assert own_device("cpu") == torch.device("cpu")
    assert check_device("cuda").index is None  # under torchrun it stands for the GPU of the rank's number


@pytest.mark.usefixtures("second_of_two_gpus")
def test_a_pipeline_moves_to_the_current_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = CausalVideoPipeline.from_pretrained("toybox", device="cpu")
    parts, moved = pipe.parts, []

    def moved_to(self: Any, device: torch.device, dtype: torch.dtype) -> Any:
        moved.append(device)
        return parts

    monkeypatch.setattr(type(parts), "moved_to", moved_to)
    assert pipe.to("cuda").device == moved[0] == torch.device("cuda", 1)


def test_an_event_is_recorded_in_the_stream_of_its_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a new thread the current GPU is the first one, whatever the main thread has set."""
    made: list[Any] = []

    class Event:
        def __init__(self, enable_timing: bool = False) -> None:
            self.timing = enable_timing

        def record(self, stream: object = None) -> None:
            made.append((self.timing, stream))

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: f"stream of {device}")
    recorded_event(torch.device("cuda", 1), timing=True)
    assert made == [(True, "stream of cuda:1")]


def test_no_other_module_records_events_by_itself() -> None:
    """`torch.cuda.Event().record()` records in the current stream of the thread's current GPU."""
    found = list[str]()
    for path in sorted((ROOT / "causalrope_sp").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            if called.endswith(("cuda.Event", ".record", ".record_event")) or called == "Event":
                found.append(f"{path.name}: {called}")
    assert found == ["devices.py: torch.cuda.Event", "devices.py: event.record"]
