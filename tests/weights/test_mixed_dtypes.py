"""Checkpoints of float32 and bfloat16: what stays in float32, against diffusers' own loader, and what it computes."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from safetensors.torch import load_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from causalrope_sp import CausalDiT, CausalVideoPipeline, LatentGrid
from causalrope_sp.pipeline.load_options import LoadOptions
from causalrope_sp.pipeline.model_source import find_model
from causalrope_sp.planning.workload import Workload
from causalrope_sp.weights import inspect_checkpoint, load_model, save_diffusers, save_model
from causalrope_sp.weights.diffusers_keys import DIFFUSERS
from tests.support.checkpoints import CONFIG, diffusers_model, run, save_wan, wan_state
from tests.support.published_folders import wan_pipeline
from tests.support.sampler_cases import relative
from tests.support.shell import shell

HALVES = [torch.bfloat16, torch.float16]


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Loaded by diffusers in bfloat16 and saved again: the list of `_keep_in_fp32_modules` in float32."""
    home = tmp_path_factory.mktemp("mixed")
    diffusers_model().save_pretrained(home / "wide")
    WanTransformer3DModel.from_pretrained(home / "wide", torch_dtype=torch.bfloat16).save_pretrained(home / "mixed")
    return home / "mixed"


def kinds(model: CausalDiT) -> dict[str, torch.dtype]:
    """The dtype of every parameter, by the name that diffusers stores it under."""
    return {
        stored: model.get_parameter(parameter).dtype
        for parameter, several in DIFFUSERS.names(model.config.num_layers).items()
        for stored in several
    }


def test_the_list_is_diffusers() -> None:
    assert set(WanTransformer3DModel._keep_in_fp32_modules) == DIFFUSERS.wide_modules
    assert AutoencoderKLWan._keep_in_fp32_modules is None  # and codecs are float32 here as a whole


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("folder", ["mixed", "wide"])
def test_what_stays_wide_is_what_diffusers_keeps_wide(mixed: Path, folder: str, dtype: torch.dtype) -> None:
    path = mixed.parent / folder
    theirs = WanTransformer3DModel.from_pretrained(path, torch_dtype=dtype)
    ours = load_model(path, dtype=dtype)
    assert kinds(ours) == {name: parameter.dtype for name, parameter in theirs.named_parameters()}
    assert ours.dtype == dtype
    for dtype_of_all in (torch.float32, torch.float64):
        assert {p.dtype for p in load_model(path, dtype=dtype_of_all).parameters()} == {dtype_of_all}


def test_the_stored_dtypes_are_kept_and_shown(mixed: Path, tmp_path: Path) -> None:
    stored = {name: tensor.dtype for name, tensor in load_file(next(mixed.glob("*.safetensors"))).items()}
    assert kinds(load_model(mixed)) == stored
    report = json.loads(shell("inspect", mixed, "--json").output)
    assert report["dtype"] == "bfloat16"
    wide = sum(p.numel() for p in load_model(mixed).parameters() if p.dtype == torch.float32)
    assert report["dtypes"] == {"bfloat16": report["parameters"] - wide, "float32": wide}
    save_diffusers(load_model(mixed), tmp_path / "again")
    assert kinds(load_model(tmp_path / "again")) == stored


def test_nothing_is_widened_that_the_file_has_in_16_bits(tmp_path: Path) -> None:
    diffusers_model(torch.bfloat16).save_pretrained(tmp_path / "all")
    assert {p.dtype for p in load_model(tmp_path / "all").parameters()} == {torch.bfloat16}


def test_wans_own_layout_is_loaded_as_self_forcing_loads_it(tmp_path: Path) -> None:
    """`model.to(bfloat16)` casts all of it."""
    model = load_model(save_wan(tmp_path / "m.safetensors", wan_state()), dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("weights", ["full", "fp8"])
def test_the_cost_model_knows_the_bytes(mixed: Path, weights: str) -> None:
    model = load_model(mixed, weights=weights)  # type: ignore[arg-type]
    wide = inspect_checkpoint(mixed).wide_parameters
    work = Workload(CONFIG, LatentGrid(4, 4), 13, 3, 4, fp8=weights == "fp8", wide=wide)
    assert sum(parameter.nbytes for parameter in model.parameters()) == work.weights_bytes


def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(1, 5, 2, 4, 4).to(dtype), torch.tensor([937.5, 937.5]), torch.randn(1, 512, 10).to(dtype)


class Operations(TorchDispatchMode):
    """Counts the operations that reach torch's kernels, casts among them."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def error(model: CausalDiT, exact: CausalDiT) -> tuple[float, float]:
    """The relative errors of a forward: of the embedded timesteps, and of the velocity."""
    seen: list[Tensor] = []
    results = []
    for each in (model, exact):
        handle = each.time_projection.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        results.append(run(each, *inputs(each.dtype)))
        handle.remove()
    assert results[0].dtype == seen[0].dtype == model.dtype
    return relative(seen[0].double(), seen[1]), relative(results[0].double(), results[1])


@pytest.mark.parametrize("dtype", HALVES)
def test_the_time_is_embedded_in_float32(mixed: Path, dtype: torch.dtype) -> None:
    """It errs by one rounding at the end; the velocity errs mostly by the rest of the model."""
    wide, exact = (load_model(mixed.parent / "wide", dtype=kind) for kind in (dtype, torch.float64))
    time, velocity = error(wide, exact)
    assert time < 0.3 * torch.finfo(dtype).eps  # half an eps at most, less on average
    narrow = error(wide.to(dtype), exact)
    assert narrow[0] > 1.5 * time
    assert velocity < 1.2 * narrow[1]


def test_a_pass_casts_no_more_than_the_embedded_time(mixed: Path) -> None:
    """As many operations of torch as without wide parameters, and one more."""
    counts = []
    model = load_model(mixed, dtype=torch.bfloat16)
    for each in (model, copy.deepcopy(model).to(torch.bfloat16)):
        with Operations() as seen:
            run(each, *inputs(torch.bfloat16))
        counts.append(seen.count)
    assert counts[0] <= counts[1] + 1


@pytest.mark.parametrize("dtype", HALVES)
def test_a_mixed_model_runs_with_fp8_weights(mixed: Path, dtype: torch.dtype) -> None:
    quantized, exact = (load_model(mixed.parent / "wide", dtype=kind, weights="fp8") for kind in (dtype, torch.float64))
    full = error(*(load_model(mixed.parent / "wide", dtype=kind) for kind in (dtype, torch.float64)))
    assert error(quantized, exact)[1] < 2 * full[1]


def test_a_pipeline_that_moves_keeps_what_is_wide(tmp_path: Path) -> None:
    wan_pipeline(tmp_path).save_pretrained(tmp_path / "plain")
    pipe = CausalVideoPipeline.from_pretrained(tmp_path / "plain", dtype="bfloat16", device="cpu", height=64, width=96)
    before = kinds(pipe.model)
    assert {*before.values()} == {torch.bfloat16, torch.float32}
    assert kinds(pipe.to("cpu").model) == before
    pipe.save_pretrained(tmp_path / "saved")
    assert kinds(load_model(tmp_path / "saved" / "transformer")) == before
    assert find_model(tmp_path / "saved", LoadOptions()).sampler == pipe.config.sampler
    assert {*kinds(pipe.to(torch.float16).model).values()} == {torch.float16}
    save_model(pipe.model, tmp_path / "m.safetensors")
    assert inspect_checkpoint(tmp_path / "m.safetensors").wide_parameters == 0
