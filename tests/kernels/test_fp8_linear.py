"""Linear layers of fp8 weights on fp8 activations: what is rounded, who else computes the same, and what is chosen."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from causalrope_kernels import fp8_linear, quantize_kernel
from causalrope_kernels.fp8_linear import (
    E4M3,
    LARGEST,
    LinearShape,
    dequantized,
    emulated,
    fp8_obstacle,
    measure,
    quantize_rows,
    scaled,
    settled_fp8_linear,
)
from causalrope_kernels.quantized_heads import quantize
from tests.support.cuda_division import CudaDivision
from tests.support.triton_cases import DEVICE, DTYPES, random

pytestmark = pytest.mark.usefixtures("bfloat16_as_on_a_gpu")

CPU = torch.device("cpu")


def layer(dtype: torch.dtype, rows: int = 40, inputs: int = 96, outputs: int = 64) -> tuple[Tensor, ...]:
    """Activations, and a weight's numbers and scales with the bias."""
    x, weight, bias = random(2, rows // 2, inputs), random(outputs, inputs, seed=1), random(outputs, seed=2)
    scale = torch.ldexp(torch.ones(outputs), torch.arange(outputs) % 7 - 8).to(DEVICE)
    return x.to(dtype), weight.to(E4M3), scale, bias.to(dtype)


def error(result: Tensor, truth: Tensor) -> float:
    return ((result.double() - truth.double()).norm() / truth.double().norm()).item()


@DTYPES
def test_numbers_come_back_within_half_a_step_of_three_bits(dtype: torch.dtype) -> None:
    x = (random(30, 77) * torch.logspace(-6, 4, 30, dtype=torch.float64, device=DEVICE).unsqueeze(1)).to(dtype)
    numbers, scale = quantize_rows(x)
    assert torch.equal(scale.cpu(), x.float().abs().amax(1, keepdim=True).cpu() / LARGEST)
    assert numbers.float().abs().amax(1).eq(LARGEST).all()
    step = torch.maximum(x.double().abs(), scale * 2.0**-6) * 2.0**-4
    assert ((numbers.double() * scale - x.double()).abs() <= step * (1 + 1e-6)).all()


@pytest.mark.filterwarnings("ignore:invalid value encountered in multiply:RuntimeWarning")
def test_rows_of_nothing_and_what_is_no_number() -> None:
    x = random(4, 9).float()
    x[0], x[1], x[2, 3], x[3, 3] = 0.0, 1e-38, math.nan, math.inf
    for backend in ("torch", "triton"):
        numbers, scale = quantize_rows(x, backend)
        made = numbers.float() * scale
        assert not made[0].any()
        assert made[1].abs().max() < 1e-37
        assert made[2, 3].isnan()
        assert made[3, 3].isnan()
    with pytest.raises(ValueError, match="x: expected activations that need no gradient"):
        quantize_rows(x.requires_grad_())


@DTYPES
@pytest.mark.parametrize("rows", [1, 4], ids=["row by row", "4 rows a program"])
def test_the_kernel_rounds_as_torch_does(dtype: torch.dtype, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same numbers, of rows that lie apart, too."""
    monkeypatch.setattr(quantize_kernel, "rows_of", lambda count, block: rows)
    monkeypatch.setattr(quantize_kernel, "_blocks", quantize_kernel._blocks.__wrapped__)  # without the cache
    x = random(3, 7, 200).to(dtype)
    for part in (x, x[..., :60], x[:, 1]):
        (numbers, scale), (expected, of_torch) = quantize_rows(part, "triton"), quantize_rows(part, "torch")
        assert torch.equal(numbers.float(), expected.float())
        assert torch.equal(scale, of_torch)


def near_halves_of_scales(largest: float) -> Tensor:
    """Maxima whose quotients lie at most three roundings away from the middle between two numbers of float16."""
    steps = torch.arange(1024, device="cpu")
    middles = ((1 + (steps + 0.5) / 1024) * largest).float()
    return torch.stack([(middles.view(torch.int32) + n).view(torch.float32) for n in range(-3, 4)], -1).flatten()


def test_scales_are_divided_on_a_gpu_as_on_a_cpu() -> None:
    for dtype, largest in ((torch.int8, 127.0), (E4M3, 448.0)):
        maxima = near_halves_of_scales(largest)
        with CudaDivision():
            rough = maxima / largest
        assert not torch.equal(rough.half(), (maxima / largest).half())  # a division by a number would be noticed
        x = random(len(maxima), 40).float().cpu().clamp(-1, 1)
        x[:, 7] = maxima
        expected = quantize_rows(x, "torch"), quantize(x, dtype)
        with CudaDivision():
            found = quantize_rows(x, "torch"), quantize(x, dtype)
        for (numbers, scale), (right, right_scale) in zip(found, expected, strict=True):
            assert torch.equal(numbers.float(), right.float())
            assert torch.equal(scale, right_scale)


@DTYPES
@pytest.mark.parametrize("gelu", [False, True])
def test_the_emulation_is_what_torch_computes_by_scaled_mm(dtype: torch.dtype, gelu: bool) -> None:
    """Against the same numbers multiplied in float64, both err by the roundings of the dtype."""
    if (why := fp8_obstacle(DEVICE, dtype)) is not None:
        pytest.skip(f"it needs {why}")
    x, numbers, scale, bias = layer(dtype)
    ours, of_torch = (compute(x, numbers, scale, bias, gelu) for compute in (emulated, scaled))
    truth = emulated(x.double(), numbers, scale, bias.double(), gelu)
    assert ours.dtype == of_torch.dtype == dtype
    assert ours.shape == of_torch.shape == (2, 20, 64)
    assert error(of_torch, truth) < torch.finfo(dtype).eps * 4
    assert error(ours, truth) <= max(error(of_torch, truth) * 1.1, torch.finfo(dtype).eps / 2)


def test_the_emulation_is_the_product_of_dequantized_numbers() -> None:
    x, numbers, scale, bias = layer(torch.float64)
    x_numbers, x_scale = quantize_rows(x)
    expected = (x_numbers.double() * x_scale) @ (numbers.double() * scale.unsqueeze(1)).t() + bias
    assert error(emulated(x, numbers, scale, bias, False).flatten(0, 1), expected) < 1e-15
    assert error(emulated(x, numbers, scale, bias, False), dequantized(x, numbers, scale, bias, False)) < 0.03


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[Any, float]]:
    """Lets the CPU choose as a GPU does, by the milliseconds that are set for the functions."""
    times: dict[Any, float] = {}

    def milliseconds(run: Any) -> float:
        run()
        return times.get(run.func, 2.0)

    monkeypatch.setattr(fp8_linear, "_multiplies_fp8", lambda device: True)
    monkeypatch.setattr(fp8_linear, "median_milliseconds", milliseconds)
    measure.cache_clear()
    yield times
    measure.cache_clear()


@pytest.mark.parametrize(("milliseconds", "chosen"), [(1.0, scaled), (4.0, dequantized)])
def test_a_gpu_takes_what_it_measured_to_be_faster(
    milliseconds: float, chosen: Any, as_on_a_gpu: dict[Any, float], caplog: pytest.LogCaptureFixture
) -> None:
    as_on_a_gpu |= {scaled: milliseconds, dequantized: 3.0}
    x, *weights = layer(torch.bfloat16)
    numbers, scale, bias = weights
    compute = settled_fp8_linear(numbers, scale, bias, gelu=True)
    with caplog.at_level(logging.INFO, "causalrope_kernels.fp8_linear"):
        assert torch.equal(compute(x.float()), chosen(x, *weights, True))
        assert torch.equal(compute(x), chosen(x, *weights, True))
    way = "fp8" if chosen is scaled else "dequantized"
    assert caplog.messages == [
        f"linear layer from 96 to 64, 40 rows, {way}: fp8 {milliseconds:.3g} ms, dequantized 3 ms; "
        "with weights in bfloat16 2 ms"
    ]
    assert compute(x[:, :0]).shape == (2, 0, 64)


def test_what_a_gpu_refuses_or_computes_wrongly_is_left_out(
    as_on_a_gpu: dict[Any, float], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    as_on_a_gpu |= {scaled: 1.0, dequantized: 3.0}

    def refuses(*_: object, **__: object) -> None:
        raise RuntimeError("Expected trailing dimension of mat1 to be divisible by 16\nbut it is not")

    product = torch._scaled_mm
    with caplog.at_level(logging.INFO, "causalrope_kernels.fp8_linear"):
        monkeypatch.setattr(torch, "_scaled_mm", refuses)
        assert measure(LinearShape(DEVICE, torch.bfloat16, 40, 96, 64, False)).chosen == "dequantized"
        monkeypatch.setattr(torch, "_scaled_mm", lambda *args, **options: 1.1 * product(*args, **options))
        assert measure(LinearShape(DEVICE, torch.bfloat16, 41, 96, 64, False)).chosen == "dequantized"
    faults = [message for message in caplog.messages if "left out" in message]
    assert faults[0].endswith("fp8 is left out: Expected trailing dimension of mat1 to be divisible by 16")
    assert "its output is off by 1.0e-01" in faults[1]
    assert len(faults) == 2


def test_where_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda", 0)
    assert fp8_obstacle(CPU, torch.float64) is None
    monkeypatch.setattr(fp8_linear, "_capability", lambda device: (9, 0))
    assert fp8_obstacle(gpu, torch.bfloat16) is None
    assert fp8_obstacle(gpu, torch.float16) == "dtype bfloat16 on a GPU, not float16"
    monkeypatch.setattr(fp8_linear, "_capability", lambda device: (8, 6))
    assert fp8_obstacle(gpu, torch.bfloat16) == "a GPU of compute capability 8.9 or above, not 8.6"
