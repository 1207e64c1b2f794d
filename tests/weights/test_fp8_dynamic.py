"""Products in 8 bits (`weights="fp8-dynamic"`): the model that is computed, on any ranks, its loss, and refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from click.testing import CliRunner
from torch import Tensor, nn
from torch.nn.functional import linear

from causalrope_kernels import fp8_linear
from causalrope_kernels.fp8_linear import quantize_rows
from causalrope_sp import CausalDiT, CausalVideoPipeline, ConfigError, SequenceParallel
from causalrope_sp.cli.main import cli
from causalrope_sp.distributed.launch import RankPool
from causalrope_sp.models.fp8_linear import Fp8Linear
from causalrope_sp.toybox import WEIGHTS
from causalrope_sp.weights import load_model, save_model
from causalrope_sp.weights.digest import digest
from tests.support.checkpoints import CONFIG, run
from tests.support.videos import video_of

FILE = WEIGHTS / "toybox.safetensors"
PROMPT = "a red circle slides right"


class Rounded(nn.Linear):
    """A layer in float64 whose activations are rounded as fp8 rounds them."""

    def forward(self, x: Tensor) -> Tensor:
        numbers, scale = quantize_rows(x)
        return linear((numbers.double() * scale).view(x.shape), self.weight, self.bias)


def rounded(layer: Fp8Linear) -> nn.Module:
    """The dense emulation of a layer: no fp8 number is multiplied."""
    outputs, inputs = layer.numbers.shape
    made = Rounded(inputs, outputs).double().requires_grad_(False)
    made.load_state_dict({"weight": layer.weight, "bias": layer.bias})
    return made


def test_the_model_is_the_dense_one_with_rounded_weights_and_activations(tmp_path: Path) -> None:
    """Weights are those of "fp8", bit for bit; the keys of the text are computed without rounding activations."""
    torch.manual_seed(0)
    save_model(CausalDiT(CONFIG).double().requires_grad_(False), tmp_path / "m.safetensors")
    full, eight, dynamic, dense = (
        load_model(tmp_path / "m.safetensors", weights=weights)
        for weights in ("full", "fp8", "fp8-dynamic", "fp8-dynamic")
    )
    assert digest(eight) == digest(dynamic)
    replaced = [name for name, module in dense.named_modules() if isinstance(module, Fp8Linear)]
    for name in replaced:
        parent, _, leaf = name.rpartition(".")
        layer = getattr(dense.get_submodule(parent), leaf)
        setattr(dense.get_submodule(parent), leaf, rounded(layer))
        if leaf == "kv":
            getattr(dense.get_submodule(parent), leaf).forward = layer.forward
    assert {name.rpartition(".")[2] for name in replaced} == {"qkv", "out", "q", "kv", "up", "down"}
    inputs = torch.randn(1, 5, 2, 4, 4).double(), torch.tensor([500.0, 500.0]), torch.randn(1, 512, 10).double()
    made, expected = run(dynamic.eval(), *inputs), run_dense(dense.eval(), *inputs)
    assert (made - expected).norm() < 1e-7 * expected.norm()
    losses = [(run(model.eval(), *inputs) - run(full, *inputs)).norm().item() for model in (eight, dynamic)]
    assert 1.05 * losses[0] < losses[1] < 3 * losses[0]


def run_dense(model: CausalDiT, *inputs: Tensor) -> Tensor:
    """`run`, by the modules' own forward."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("causalrope_sp.models.parts.linear", by_module)
        patch.setattr("causalrope_sp.models.block.linear", by_module)
        return run(model, *inputs)


def by_module(module: nn.Module, operations: Any, gelu: bool = False) -> Any:
    return lambda x: nn.functional.gelu(module(x), approximate="tanh") if gelu else module(x)


def psnr(first: Any, second: Any) -> float:
    difference = torch.from_numpy(first).double() - torch.from_numpy(second).double()
    return float(10 * torch.log10(255**2 / difference.square().mean()))


def test_toybox_loses_little() -> None:
    full, eight, dynamic = (
        video_of(CausalVideoPipeline.from_pretrained("toybox", device="cpu", weights=w), PROMPT, num_frames=21)
        for w in ("full", "fp8", "fp8-dynamic")
    )
    assert 35 < psnr(dynamic, full) < psnr(eight, full)
    assert psnr(dynamic, eight) < 60


def on_ranks(group: dist.ProcessGroup, device: str, strategy: str) -> Any:
    parallel = SequenceParallel(group, strategy, device)
    pipe = CausalVideoPipeline.from_pretrained("toybox", parallel=parallel, dtype="float64", weights="fp8-dynamic")
    return video_of(pipe, PROMPT, num_frames=21)


def disagreeing(group: dist.ProcessGroup, device: str) -> str:
    parallel = SequenceParallel(group, "auto", device)
    try:
        CausalVideoPipeline.from_pretrained("toybox", parallel=parallel, weights=("fp8", "fp8-dynamic")[group.rank()])
    except ConfigError as reason:
        return str(reason)
    return "nothing"


@pytest.mark.parametrize("strategy", ["ulysses", "gather-kv", "shard-kv"])
def test_ranks_compute_the_same(strategy: str, pool: RankPool) -> None:
    alone = CausalVideoPipeline.from_pretrained("toybox", device="cpu", dtype="float64", weights="fp8-dynamic")
    made = pool.run(on_ranks, 3, strategy)
    assert abs(made.astype(int) - video_of(alone, PROMPT, num_frames=21)).max() <= 1


def test_ranks_must_compute_alike(pool: RankPool) -> None:
    assert "weights" in pool.run(disagreeing, 2)


def test_where_it_cannot_run_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fp8_linear, "_capability", lambda device: (8, 0))
    message = r"weights='fp8-dynamic' needs a GPU of compute capability 8\.9 or above, not 8\.0; weights='fp8' computes"
    with pytest.raises(ConfigError, match=message):
        load_model(FILE, weights="fp8-dynamic", device="cuda", dtype=torch.bfloat16)
    monkeypatch.setattr(fp8_linear, "_capability", lambda device: (9, 0))
    with pytest.raises(ConfigError, match="needs dtype bfloat16 on a GPU, not float32"):
        load_model(FILE, weights="fp8-dynamic", device="cuda", dtype=torch.float32)
    pipe = CausalVideoPipeline.from_pretrained("toybox", device="cpu", weights="fp8-dynamic")
    monkeypatch.setattr("causalrope_sp.pipeline.pipeline.own_device", lambda device: torch.device("cuda", 0))
    with pytest.raises(ConfigError, match="needs dtype bfloat16 on a GPU, not float32"):
        pipe.to("cuda")
    with pytest.raises(ConfigError, match="a model with fp8 weights cannot be saved"):
        save_model(pipe.model, "m")


def test_on_the_command_line(tmp_path: Path) -> None:
    result = CliRunner().invoke(
        cli, ["generate", PROMPT, "--frames", "9", "--weights", "fp8-dynamic", "--out", str(tmp_path / "v.mp4")]
    )
    assert result.exit_code == 0, result.output
    assert (tmp_path / "v.mp4").exists()
    found = {}
    for weights in ("full", "fp8", "fp8-dynamic"):
        words = ["plan", "--model", "wan2.1-1.3b", "--ranks", "1", "--weights", weights, "--json"]
        (found[weights],) = json.loads(CliRunner().invoke(cli, words).output)["strategies"]
    assert found["fp8-dynamic"]["weights_bytes"] == found["fp8"]["weights_bytes"] < found["full"]["weights_bytes"]
    tokens = 6 * 1560  # of a fused pass
    assert found["fp8-dynamic"]["activation_bytes"] - found["fp8"]["activation_bytes"] == 8960 * tokens
    assert found["fp8-dynamic"]["chunk_ms"] < found["full"]["chunk_ms"] < found["fp8"]["chunk_ms"]
    result = CliRunner().invoke(cli, ["plan", "--weights", "fp8-dynamic", "--gpu", "a100"])
    assert result.exit_code == 2
    assert result.output == "error: --weights fp8-dynamic needs a GPU of compute capability 8.9 or above, not a100\n"
