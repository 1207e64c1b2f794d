"""Checkpoints that other libraries have quantized are refused by the name of their format.

The files in `tests/quantized_files` are those of the libraries themselves; its README says how they were made.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from causalrope_sp import CheckpointError
from causalrope_sp.text.umt5_checkpoint import T5Checkpoint
from causalrope_sp.weights import load_model, torch_files
from tests.support import text_files
from tests.support.checkpoints import save_wan, wan_state
from tests.support.paths import ROOT
from tests.support.shell import shell

FILES = ROOT / "tests" / "quantized_files"
BLOCK = "blocks.0.self_attn.q"
NVFP4 = json.dumps({"format_version": "1.0", "layers": {BLOCK: {"format": "nvfp4"}}})


@pytest.mark.parametrize(
    ("folder", "told"),
    [
        ("torchao", r"quantized by torchao \(it has blocks\.0\.\S+\._weight_qdata\)"),
        ("torchao-pickle", r"quantized by torchao \(it holds torchao\.quantization\.Int8Tensor\)"),
        ("quanto", r"quantized by optimum-quanto \(it has blocks\.0\.\S+\.weight\._data\)"),
        ("bnb-4", r"quantized by bitsandbytes \(4 bits\) \(it has blocks\.0\.\S+\.weight\.absmax\)"),
        ("bnb-8", r"quantized by bitsandbytes \(8 bits\) \(it has blocks\.0\.\S+\.SCB\)"),
    ],
)
def test_what_a_library_has_quantized_is_named(folder: str, told: str) -> None:
    with pytest.raises(CheckpointError, match=f"{told}, a format that is not read; save the model before"):
        load_model(FILES / folder)
    result = shell("inspect", FILES / folder)
    assert (result.exit_code, len(result.output.splitlines())) == (2, 1)


@pytest.mark.parametrize("folder", ["torchao", "quanto", "bnb-4", "bnb-8"])
def test_config_json_names_the_format_where_no_tensor_does(folder: str, tmp_path: Path) -> None:
    """As of a format that is not known by its tensors: the same config.json, and numbers of one byte."""
    (tmp_path / "config.json").write_text((FILES / folder / "config.json").read_text())
    method = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["quant_method"]
    state = wan_state()
    save_file(state | {f"{BLOCK}.weight": state[f"{BLOCK}.weight"].char()}, tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match=rf"quantized by {method} \(config\.json has quantization_config\)"):
        load_model(tmp_path / "m.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"num_heads": 3, "quantization_config": {"quant_method": method}}))
    save_wan(tmp_path / "m.safetensors", state)  # not quantized, whatever config.json says
    assert load_model(tmp_path / "m.safetensors").config.num_heads == 3


@pytest.mark.parametrize(
    ("more", "metadata", "told"),
    [
        ({f"{BLOCK}.scale_weight": torch.ones(1)}, {}, "ComfyUI, in another form than fp8 with one scale for"),
        ({f"{BLOCK}.weight_scale": torch.ones(3, 2)}, {}, "in another form than 8 bits with one scale for a tensor"),
        ({f"{BLOCK}.weight_scale_inv": torch.ones(3, 2)}, {}, "fp8 in blocks (it has blocks.0.self_attn.q.weight_sca"),
        ({f"{BLOCK}.comfy_quant": torch.ones(1).byte()}, {}, "ComfyUI (it has blocks.0.self_attn.q.comfy_quant)"),
        ({f"{BLOCK}.wscales": torch.ones(1)}, {}, "nunchaku (SVDQuant) (it has blocks.0.self_attn.q.wscales)"),
        ({f"{BLOCK}.qzeros": torch.ones(1).int()}, {}, "GPTQ or AWQ (it has blocks.0.self_attn.q.qzeros)"),
        ({}, {"quantization_config": "{}"}, "nunchaku (SVDQuant) (its metadata has quantization_config)"),
        ({}, {"_quantization_metadata": NVFP4}, "ComfyUI as nvfp4 (its metadata has _quantization_metadata)"),
        ({}, {"_quantization_metadata": "{}"}, "ComfyUI as an unknown form (its metadata has _quantization_metadat"),
    ],
)
def test_other_writers_are_named(tmp_path: Path, more: dict[str, Tensor], metadata: dict[str, str], told: str) -> None:
    save_file(wan_state() | more, tmp_path / "m.safetensors", metadata)
    with pytest.raises(CheckpointError) as caught:
        load_model(tmp_path / "m.safetensors")
    assert told in str(caught.value)


def test_eight_bits_of_no_known_scale_are_refused(tmp_path: Path) -> None:
    """Numbers beside a scale that is not understood would be taken for a plain cast."""
    state = wan_state()
    numbers = state[f"{BLOCK}.weight"].to(torch.float8_e4m3fn)
    for end, scale in (
        ("weight_scale", torch.ones(3, 2)),
        ("scale_inv", torch.ones(1)),
        ("weight_zero", torch.ones(1)),
    ):
        save_wan(tmp_path / "m.safetensors", state | {f"{BLOCK}.weight": numbers, f"{BLOCK}.{end}": scale})
        with pytest.raises(CheckpointError, match=r"another form than 8 bits|stored as F8_E4M3"):
            load_model(tmp_path / "m.safetensors")


class Subclass(Tensor):
    """As those of a library that has told torch that its classes are safe to load."""


def test_tensors_of_a_librarys_own_class_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With torchao imported its pickles load, as tensors that no parameter can be copied from."""
    state = wan_state()
    monkeypatch.setattr(
        torch_files, "_load_tensors_only", lambda *_: state | {f"{BLOCK}.weight": torch.ones(2).as_subclass(Subclass)}
    )
    torch.save(state, tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match=r"blocks\.0\.self_attn\.q\.weight is a \S+\.Subclass"):
        load_model(tmp_path / "m.pt")
    monkeypatch.setattr(Subclass, "__module__", "torchao.quantization")
    with pytest.raises(CheckpointError, match=r"quantized by torchao \(it holds torchao\.quantization\.Subclass\)"):
        load_model(tmp_path / "m.pt")
    monkeypatch.undo()
    torch.save({name: nn.Parameter(tensor) for name, tensor in state.items()}, tmp_path / "m.pt")
    (tmp_path / "config.json").write_text('{"num_heads": 3}')
    assert load_model(tmp_path / "m.pt").config.num_heads == 3


def test_a_quantized_text_encoder_is_named(tmp_path: Path) -> None:
    text_files.save_diffusers(tmp_path, text_files.make_encoder())
    file = tmp_path / "text_encoder" / "model.safetensors"
    state = text_files.make_encoder().state_dict()
    save_file({f"{name}.SCB": tensor.clone() for name, tensor in state.items()}, file)
    with pytest.raises(CheckpointError, match=r"quantized by bitsandbytes \(8 bits\)"):
        T5Checkpoint.open(tmp_path / "text_encoder")
