"""Which attention `auto` takes, on libraries that are not there: every one here is a stand-in with the calling
convention of the real one."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from causalrope_kernels import Keys, attention_choice, attention_libraries, reference
from causalrope_kernels.attention_choice import Shape, measure
from causalrope_kernels.attention_libraries import LIBRARIES, Library
from causalrope_kernels.reference import Partial
from tests.support.triton_cases import DEVICE
from tests.support.watching import noted

SHAPE = Shape(DEVICE, torch.float32, 2, 5, 40, 3, 16)
Q, (K, V) = torch.randn(2, 5, 3, 16), torch.randn(2, 2, 40, 3, 16)


class Present(Library):
    """A library that goes anywhere."""

    def obstacle(self, q_BTHD: Tensor) -> None:
        return None


def right(q: Tensor, k: Tensor, v: Tensor) -> Partial:
    return reference.attention_lse(q, k, v)


def also_right(q: Tensor, k: Tensor, v: Tensor) -> Partial:
    return right(q, k, v)


def wrong(q: Tensor, k: Tensor, v: Tensor) -> Partial:
    return right(q, k.flip(3), v)


def sideways(q: Tensor, k: Tensor, v: Tensor) -> Partial:
    output, lse = right(q, k, v)
    return output.transpose(1, 2), lse


def broken(q: Tensor, k: Tensor, v: Tensor) -> Partial:
    raise RuntimeError("no kernel image\nis available")


@pytest.fixture
def libraries(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Library]]:
    """Stand-ins by name, as the test fills them in; how long each takes goes by its function."""
    found: dict[str, Library] = {}
    monkeypatch.setattr(attention_choice, "LIBRARIES", found)
    times = {"right": 2.0, "also_right": 1.0, "by_triton": 9.0}
    monkeypatch.setattr(attention_choice, "median_milliseconds", lambda run: times.get(run.func.__name__, 5.0))
    measure.cache_clear()
    yield found
    measure.cache_clear()


def test_the_fastest_that_is_right_is_chosen_and_said(
    libraries: dict[str, Library], caplog: pytest.LogCaptureFixture
) -> None:
    libraries |= {"a": Present(right), "b": Present(also_right), "c": Present(wrong), "d": Present(broken)}
    libraries |= {"e": Present(sideways), "f": Present(also_right, exact=False)}
    with caplog.at_level(logging.INFO, "causalrope_kernels"):
        measured = measure(SHAPE)
    assert measured.chosen == "b"
    assert measured.milliseconds == {"a": 2.0, "b": 1.0, "triton": 9.0}
    assert measured.refused["d"] == "no kernel image"
    assert "off by" in measured.refused["c"]
    assert "shape" in measured.refused["e"]
    first, *rest = [record.getMessage() for record in caplog.records]
    assert first == "attention of 5 on 40 tokens, 3 heads of 16, float32, by b: b 1 ms, a 2 ms, triton 9 ms"
    assert [line.split(":")[1] for line in rest] == [" c is left out", " d is left out", " e is left out"]


def test_a_shape_is_measured_once(libraries: dict[str, Library]) -> None:
    calls: list[Tensor] = []
    libraries["a"] = Present(noted(right, lambda q, k, v: calls.append(q)))
    measure(SHAPE)
    seen = len(calls)
    measure(SHAPE)
    assert len(calls) == seen > 0


def test_on_the_cpu_there_is_no_choice() -> None:
    assert attention_choice.choose(Q, Keys(K, V)) == "torch"


CONVENTIONS: dict[str, tuple[str, str, Callable[..., Any]]] = {
    "flash-attn-2": (
        "flash_attn",
        "flash_attn_func",
        lambda q, k, v, return_attn_probs: (*heads_first(q, k, v), None),
    ),
    "flash-attn-3": (
        "flash_attn_interface",
        "flash_attn_func",
        lambda q, k, v, return_attn_probs: heads_first(q, k, v),
    ),
    "flash-attn-4": ("flash_attn.cute", "flash_attn_func", lambda q, k, v, return_lse: heads_first(q, k, v)),
    "sage": ("sageattention", "sageattn", lambda q, k, v, tensor_layout, return_lse: heads_first(q, k, v)),
}


def heads_first(q: Tensor, k: Tensor, v: Tensor) -> Partial:
    """They all give the log-sum-exp as (B, H, T)."""
    output, lse = right(q, k, v)
    return output, lse.transpose(1, 2)


@pytest.mark.parametrize("older", [False, True])
@pytest.mark.parametrize("name", CONVENTIONS)
def test_libraries_are_called_as_they_ask(name: str, older: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    module, function, stand_in = CONVENTIONS[name]
    if older and name in ("flash-attn-3", "flash-attn-4"):  # without the option they returned both
        stand_in = heads_first
    fake = ModuleType(module)
    setattr(fake, function, stand_in)
    monkeypatch.setitem(sys.modules, module, fake)
    if "." in module:
        package = ModuleType(module.split(".")[0])
        package.cute = fake  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, package.__name__, package)
    for found, expected in zip(LIBRARIES[name].run(Q, K, V), right(Q, K, V), strict=True):
        torch.testing.assert_close(found, expected)


def test_torch_kernels_are_called_as_they_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch shapes them: (B, H, T, d), and a log-sum-exp of (B, H, T) with room behind, or of (B, H, T, 1)."""

    def padded(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        output, lse = heads_first(*(x.transpose(1, 2) for x in (q, k, v)))
        room = lse.new_zeros(*lse.shape[:2], 32)
        room[..., : lse.shape[2]] = lse
        return output.transpose(1, 2), room, lse

    def with_one_behind(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        output, lse = heads_first(*(x.transpose(1, 2) for x in (q, k, v)))
        return output.transpose(1, 2), lse.unsqueeze(-1)

    calls = {"flash": padded, "efficient": padded, "cudnn": with_one_behind}
    for name, call in calls.items():
        monkeypatch.setattr(torch.ops.aten, f"_scaled_dot_product_{name}_attention", call)
        for found, expected in zip(LIBRARIES[name].run(Q, K, V), right(Q, K, V), strict=True):
            torch.testing.assert_close(found, expected)


def test_what_a_library_cannot_do_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnCuda:
        is_cuda, device = True, "cuda:0"

        def __init__(self, width: int, dtype: torch.dtype = torch.bfloat16) -> None:
            self.shape, self.dtype = (1, 5, 3, width), dtype

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert LIBRARIES["flash"].obstacle(OnCuda(128)) is None  # type: ignore[arg-type]
    assert "head widths that 8 divides" in LIBRARIES["flash"].obstacle(OnCuda(20))  # type: ignore
    assert "up to 128, not 160" in LIBRARIES["cudnn"].obstacle(OnCuda(160))  # type: ignore
    assert "not in torch.float32" in LIBRARIES["flash"].obstacle(OnCuda(64, torch.float32))  # type: ignore
    assert "not installed" in LIBRARIES["flash-attn-4"].obstacle(OnCuda(64))  # type: ignore
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "compute capability 8" in LIBRARIES["flash"].obstacle(OnCuda(64))  # type: ignore
    assert attention_libraries.is_installed("torch.nn")


def test_measuring_needs_little_memory(libraries: dict[str, Library]) -> None:
    """Keys and values once in their dtype, what one head takes in float32, and the scores."""
    shape = Shape(torch.device("cpu"), torch.bfloat16, 1, 64, 4096, 12, 64)
    with torch.profiler.profile(profile_memory=True) as profiler:
        attention_choice._expected(*attention_choice._random(shape))
    held = most = 0
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    keys, one_head = 4096 * 12 * 64 * 2, 2 * 4096 * 64 * 4
    scores = 3 * 64 * 4096 * 4
    assert keys < most < keys + one_head + scores + 1e6
    _, k, v = attention_choice._random(Shape(torch.device("cpu"), torch.bfloat16, 1, 1, 40, 1, 12))
    assert (v.data_ptr() - k.data_ptr()) % 16 == 0, "as those of a cache"
