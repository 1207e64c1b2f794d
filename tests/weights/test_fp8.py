"""Weights in 8 bits: what is stored, what is computed with it, and what that costs."""

from __future__ import annotations

import bisect
import itertools
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from causalrope_sp import CausalDiT, CausalVideoPipeline, CheckpointError, ConfigError, DiTConfig, LatentGrid
from causalrope_sp.models.fp8_linear import Fp8Linear
from causalrope_sp.planning.workload import Workload
from causalrope_sp.toybox import WEIGHTS
from causalrope_sp.weights import load_model, save_model
from causalrope_sp.weights.digest import digest
from causalrope_sp.weights.fp8 import quantized, to_fp8
from tests.support.checkpoints import CONFIG, run
from tests.support.videos import video_of

FILE = WEIGHTS / "toybox.safetensors"


def dequantized(weight_NK: Tensor, computes_in: torch.dtype = torch.float64) -> Tensor:
    numbers, scale = to_fp8(weight_NK, computes_in)
    return numbers.double() * scale.double().unsqueeze(1)


@given(st.integers(0, 2**32), st.integers(-100, 100))
def test_a_weight_comes_back_within_half_a_step(seed: int, exponent: int) -> None:
    """e4m3 has three bits after the first: half a step is 2^-4 of a number, or of the least normal one."""
    weight = torch.randn(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent
    weight *= torch.logspace(-3, 3, 5, dtype=torch.float64).unsqueeze(1)
    _, scale = to_fp8(weight, torch.float64)
    allowed = torch.maximum(weight.abs(), scale.double().unsqueeze(1) * 2.0**-6) * 2.0**-4
    assert bool(((dequantized(weight) - weight).abs() <= allowed).all())
    assert torch.equal(torch.frexp(scale).mantissa, torch.full_like(scale, 0.5))  # a power of two


E4M3 = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).double().tolist()  # by their codes, to 448


def nearest_even(value: float) -> float:
    """The nearest e4m3 number of a magnitude, of two as near the one with the even code, in exact arithmetic."""
    above = min(bisect.bisect_left(E4M3, value), len(E4M3) - 1)
    both = sorted({max(above - 1, 0), above})
    return E4M3[min(both, key=lambda code: (abs(Fraction(E4M3[code]) - Fraction(value)), code % 2))]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_numbers_are_the_nearest_and_of_two_the_even_one(dtype: torch.dtype) -> None:
    """Beside every midpoint too, where float64 rounded by way of float32 would be rounded twice."""
    halves = torch.tensor([(a + b) / 2 for a, b in itertools.pairwise(E4M3)], dtype=dtype)
    ends = halves.new_tensor([0.0, float("inf")]).expand(len(halves), 2).unbind(1)
    random = torch.rand(500, dtype=dtype, generator=torch.Generator().manual_seed(0)) * 440
    values = torch.cat([halves, torch.nextafter(halves, ends[0]), torch.nextafter(halves, ends[1]), random])
    values = values[values <= 440]
    numbers, scale = to_fp8(torch.stack([values, -values]), torch.float64)
    assert scale.tolist() == [1, 1]
    expected = [nearest_even(value) for value in values.tolist()]
    assert numbers.double().tolist() == [expected, [-value for value in expected]]


def test_float16_gets_scales_that_it_has() -> None:
    """Rows down to its least number, 2^-24, come back no worse than in float16 with e4m3's three bits on top."""
    rows = torch.logspace(-7, 4.8, 60, dtype=torch.float64).unsqueeze(1)  # 1e-7 to 63096
    weight = rows * torch.linspace(0.1, 1, 40, dtype=torch.float64)
    numbers, scale = to_fp8(weight, torch.float16)
    made = (numbers.half() * scale.half().unsqueeze(1)).double()
    assert made.isfinite().all()
    assert bool((made.amax(1) > 0).all())
    half_step = torch.maximum(weight, scale.double().unsqueeze(1) * 2.0**-6) * 2.0**-4
    assert bool(((made - weight).abs() <= half_step + 2.0**-25).all())


@pytest.mark.parametrize(("dtype", "loads"), [(torch.float16, False), (torch.bfloat16, True), (torch.float32, True)])
def test_a_weight_that_overflows_is_refused_in_the_dtype_that_computes(
    tmp_path: Path, dtype: torch.dtype, loads: bool
) -> None:
    model = CausalDiT(DiTConfig(dim=12, ffn_dim=12, num_heads=1, num_layers=1, text_dim=4)).requires_grad_(False)
    model.get_parameter("blocks.0.ffn.up.weight").fill_(1e5)
    model.get_parameter("blocks.0.ffn.down.weight").fill_(3e-6)
    save_model(model, tmp_path / "m")
    if not loads:
        with pytest.raises(CheckpointError, match=r"1 NaN or infinite in float16: blocks\.0\.ffn\.0\.weight"):
            load_model(tmp_path / "m", weights="fp8", dtype=dtype)
        model.get_parameter("blocks.0.ffn.up.weight").fill_(1e4)
        save_model(model, tmp_path / "m")
    down = load_model(tmp_path / "m", weights="fp8", dtype=dtype).get_submodule("blocks.0.ffn.down")
    assert isinstance(down, Fp8Linear)
    assert down.weight.dtype == dtype
    assert down.weight.double().sub(3e-6).abs().max() < 3e-6 * 2.0**-4


def test_nothing_and_next_to_nothing_stay_so() -> None:
    assert not dequantized(torch.zeros(2, 3)).any()
    assert dequantized(torch.full((1, 2), 1e-44)).abs().max() < 1e-43
    assert dequantized(torch.full((1, 1), 3e38)).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_what_is_computed_is_the_model_with_its_unfolded_weights(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(24, 17).to(dtype).requires_grad_(False)
    layer = Fp8Linear(linear)
    numbers, scale = to_fp8(linear.weight, dtype)
    layer.load_state_dict({"numbers": numbers, "scale": scale, "bias": linear.bias}, assign=True)
    assert torch.equal(layer.weight.double(), dequantized(linear.weight))  # the same numbers in every dtype
    x = torch.randn(3, 24, dtype=dtype)
    assert torch.equal(layer(x), nn.functional.linear(x, dequantized(linear.weight).to(dtype), linear.bias))


def test_a_model_computes_with_its_unfolded_weights(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = CausalDiT(CONFIG).double().requires_grad_(False)
    save_model(model, tmp_path / "m.safetensors")
    eight = load_model(tmp_path / "m.safetensors", weights="fp8")
    for name in quantized(model):
        parameter = model.get_parameter(name)
        parameter.copy_(dequantized(parameter))
    inputs = torch.randn(1, 5, 2, 4, 4).double(), torch.tensor([500.0, 500.0]), torch.randn(1, 512, 10).double()
    assert torch.equal(run(eight.eval(), *inputs), run(model.eval(), *inputs))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_cost_model_knows_the_bytes(dtype: torch.dtype) -> None:
    model = load_model(FILE, dtype=dtype, weights="fp8")
    work = Workload(model.config, LatentGrid(4, 4), 13, 3, 4, itemsize=dtype.itemsize, fp8=True)
    assert sum(parameter.nbytes for parameter in model.parameters()) == work.weights_bytes
    full = load_model(FILE, dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {dtype, torch.float32, torch.float8_e4m3fn}
    assert model.dtype == full.dtype
    assert digest(model) not in (digest(full), digest(load_model(FILE, dtype=torch.float64, weights="fp8")))


def test_the_error_is_what_three_bits_cost() -> None:
    """Uniform numbers would lose 2.6 % each; a product of many loses as much, and toybox's video stays what it was."""
    full, eight = (load_model(FILE, dtype=torch.float64, weights=w) for w in ("full", "fp8"))
    weights = dict(eight.named_modules())
    for name in quantized(full):
        true, folded_one = full.get_parameter(name), weights[name.removesuffix(".weight")].weight
        assert 0.02 < ((folded_one - true).norm() / true.norm()).item() < 0.03
    videos = [
        video_of(
            CausalVideoPipeline.from_pretrained("toybox", device="cpu", weights=w),
            "a red circle slides right",
            num_frames=21,
        )
        for w in ("full", "fp8")
    ]
    first, second = (torch.from_numpy(video).double() for video in videos)
    psnr = 10 * torch.log10(255**2 / (first - second).square().mean())
    assert 25 < psnr < 60


def test_wrong_weights_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="weights must be full or fp8 or fp8-dynamic, not 'int4'"):
        load_model(FILE, weights="int4")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="a model with fp8 weights cannot be saved"):
        save_model(load_model(FILE, weights="fp8"), tmp_path / "m")
    model = CausalDiT(DiTConfig(dim=12, ffn_dim=12, num_heads=1, num_layers=1, text_dim=4)).requires_grad_(False)
    model.get_parameter("blocks.0.ffn.up.weight")[3, 4] = torch.inf  # which 8 bits have no number for
    save_model(model, tmp_path / "m")
    with pytest.raises(CheckpointError, match=r"1 NaN or infinite.*: blocks\.0\.ffn\.0\.weight"):
        load_model(tmp_path / "m", weights="fp8")
