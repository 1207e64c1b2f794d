"""fp8 of ComfyUI and its relatives, and GGUF, are dequantized as they are read, with the numbers of the writers."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from causalrope_sp import CheckpointError, DiTConfig
from causalrope_sp.codec.codec_loader import load_codec
from causalrope_sp.models.causal_dit import CausalDiT
from causalrope_sp.models.fp8_linear import Fp8Linear
from causalrope_sp.text.umt5_checkpoint import T5Checkpoint
from causalrope_sp.toybox import WEIGHTS
from causalrope_sp.weights import Lora, inspect_checkpoint, load_model, save_model
from causalrope_sp.weights.key_layout import stored_tensors
from causalrope_sp.weights.wan_keys import WAN
from tests.support import text_files
from tests.support.checkpoints import CONFIG, run, save_wan, wan_state
from tests.support.shell import shell
from tests.support.stored_files import Type, save_scaled_fp8, write_gguf

WIDE = DiTConfig(dim=256, ffn_dim=512, num_heads=2, num_layers=1, text_dim=32, freq_dim=16, in_channels=4)
HEADS = {"config": json.dumps({"num_heads": CONFIG.num_heads})}


def wide_state() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return stored_tensors(WAN, WIDE, CausalDiT(WIDE).state_dict())


def check(model: CausalDiT, exact: dict[str, Tensor], folder: Path) -> None:
    """The model has exactly these numbers, rounded to its dtype once."""
    save_file(
        {name: tensor.contiguous() for name, tensor in exact.items()},
        folder / "exact.safetensors",
        {"config": json.dumps({"num_heads": model.config.num_heads})},
    )
    wanted = load_model(folder / "exact.safetensors", dtype=model.dtype).state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, wanted[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize("end", ["scale_weight", "weight_scale"])
def test_scaled_fp8(tmp_path: Path, end: str, by_row: bool, dtype: torch.dtype) -> None:
    """One scale for each matrix (ComfyUI) or output (LightX2V), beside a marker and input scales."""
    exact = save_scaled_fp8(tmp_path / "m.safetensors", wan_state(), HEADS, end, by_row)
    assert sum(not torch.equal(exact[name], tensor) for name, tensor in wan_state().items()) == 20
    check(load_model(tmp_path / "m.safetensors", dtype=dtype), exact, tmp_path)
    report = inspect_checkpoint(tmp_path / "m.safetensors")
    assert (report.problem, report.dtype) == (None, torch.bfloat16)
    assert shell("inspect", tmp_path / "m.safetensors").exit_code == 0


@pytest.mark.parametrize("note", ["tensor", "metadata"])
def test_fp8_with_comfyui_s_notes(tmp_path: Path, note: str) -> None:
    """Since 2025 ComfyUI notes the format beside each weight, or in the header."""
    state, name = wan_state(), "blocks.1.ffn.0"
    numbers = state[f"{name}.weight"].to(torch.float8_e4m3fn)
    written = state | {f"{name}.weight": numbers, f"{name}.weight_scale": torch.tensor(0.5)}
    metadata = dict(HEADS)
    text = json.dumps({"format": "float8_e4m3fn"})
    if note == "tensor":
        written[f"{name}.comfy_quant"] = torch.tensor(list(text.encode()), dtype=torch.uint8)
    else:
        metadata["_quantization_metadata"] = json.dumps({"layers": {name: json.loads(text)}})
    save_file(written, tmp_path / "m.safetensors", metadata)
    check(load_model(tmp_path / "m.safetensors"), state | {f"{name}.weight": numbers.float() * 0.5}, tmp_path)
    written[f"{name}.comfy_quant"] = torch.tensor(list(b'{"format": "nvfp4"}'), dtype=torch.uint8)
    save_file(written, tmp_path / "m.safetensors", metadata)
    with pytest.raises(CheckpointError, match=r"quantized by ComfyUI"):
        load_model(tmp_path / "m.safetensors")


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_plain_casts_to_fp8(tmp_path: Path, kind: torch.dtype, suffix: str) -> None:
    cast = {name: tensor.to(kind) for name, tensor in wan_state().items()}
    file = tmp_path / f"m{suffix}"
    if suffix == ".pt":
        torch.save(cast, file)
        (tmp_path / "config.json").write_text(HEADS["config"])
    else:
        save_file(cast, file, HEADS)
    model = load_model(file)
    assert model.dtype == torch.bfloat16
    check(model, {name: tensor.float() for name, tensor in cast.items()}, tmp_path)


def test_int8_with_a_scale_for_each_output(tmp_path: Path) -> None:
    state, name = wan_state(), "blocks.0.self_attn.v"
    scale = state[f"{name}.weight"].abs().amax(1, keepdim=True) / 127
    numbers = (state[f"{name}.weight"] / scale).round().to(torch.int8)
    written = state | {f"{name}.weight": numbers, f"{name}.weight_scale": scale}
    save_file(written, tmp_path / "m.safetensors", HEADS)
    exact = state | {f"{name}.weight": numbers.float() * scale}
    check(load_model(tmp_path / "m.safetensors", dtype=torch.float32), exact, tmp_path)


@pytest.mark.parametrize("by_row", [False, True])
def test_fp8_stays_fp8(tmp_path: Path, by_row: bool) -> None:
    """With weights="fp8" the stored numbers and scales are taken as they are: nothing is rounded again."""
    exact = save_scaled_fp8(tmp_path / "m.safetensors", wan_state(), HEADS, by_row=by_row)
    model = load_model(tmp_path / "m.safetensors", dtype=torch.float32, weights="fp8")
    full = load_model(tmp_path / "m.safetensors", dtype=torch.float32)
    for name, module in model.named_modules():
        if isinstance(module, Fp8Linear):
            assert torch.equal(module.weight, full.get_parameter(f"{name}.weight")), name
    assert exact.keys() == wan_state().keys()
    torch.manual_seed(0)
    pair = {
        "blocks.0.ffn.0.lora_A.weight": torch.randn(2, CONFIG.dim),
        "blocks.0.ffn.0.lora_B.weight": torch.randn(CONFIG.ffn_dim, 2),
    }
    save_file(pair, tmp_path / "lora.safetensors")
    merged = load_model(
        tmp_path / "m.safetensors", dtype=torch.float32, weights="fp8", loras=[Lora(tmp_path / "lora.safetensors")]
    )
    changed = [
        name
        for name, tensor in model.state_dict().items()
        if not torch.equal(tensor.float(), merged.state_dict()[name].float())
    ]
    assert changed == ["blocks.0.ffn.up.numbers", "blocks.0.ffn.up.scale"]


def test_a_scale_that_float16_lacks_is_not_taken_over(tmp_path: Path) -> None:
    state, name = wan_state(), "blocks.0.ffn.0"
    numbers = torch.full((CONFIG.ffn_dim, CONFIG.dim), 448.0).to(torch.float8_e4m3fn)
    written = state | {f"{name}.weight": numbers, f"{name}.scale_weight": torch.tensor(1e-9)}
    save_file(written, tmp_path / "m.safetensors", HEADS)
    model = load_model(tmp_path / "m.safetensors", dtype=torch.float16, weights="fp8")
    kept = model.get_submodule("blocks.0.ffn.up")
    assert isinstance(kept, Fp8Linear)
    torch.testing.assert_close(kept.weight.float(), torch.full_like(kept.weight.float(), 448e-9), rtol=0.1, atol=0)


KINDS = [Type.Q8_0, Type.Q4_0, Type.Q4_K, Type.Q5_K, Type.Q6_K, Type.F16, Type.BF16, Type.Q5_1]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_gguf(tmp_path: Path, kind: Any) -> None:
    """The `gguf` package dequantizes the same numbers; the patch embedding has five axes by the metadata."""
    exact = write_gguf(tmp_path / "m.gguf", wide_state(), kind)
    for dtype in (torch.float32, torch.bfloat16):
        check(load_model(tmp_path / "m.gguf", dtype=dtype), exact, tmp_path)
    assert load_model(tmp_path / "m.gguf").dtype == (torch.float16 if kind == Type.F16 else torch.bfloat16)
    shown = shell("inspect", tmp_path / "m.gguf", "--json")
    assert shown.exit_code == 0
    assert json.loads(shown.output)["missing"] == []
    (tmp_path / "exact.safetensors").unlink()
    assert load_model(tmp_path).config == load_model(tmp_path / "m.gguf").config  # the only checkpoint in a folder


def test_gguf_with_five_axes_as_they_are(tmp_path: Path) -> None:
    exact = write_gguf(tmp_path / "m.gguf", wide_state(), Type.Q8_0, flat="")
    check(load_model(tmp_path / "m.gguf", dtype=torch.float32), exact, tmp_path)


def test_diffusers_computes_the_same_from_the_same_gguf_file(tmp_path: Path) -> None:
    """Its own reader, dequantization and model, against ours in float32."""
    from diffusers import GGUFQuantizationConfig, WanTransformer3DModel

    write_gguf(tmp_path / "m.gguf", wide_state(), Type.Q8_0, flat="")
    (tmp_path / "config" / "transformer").mkdir(parents=True)
    sizes = {"num_attention_heads": WIDE.num_heads, "attention_head_dim": WIDE.head_dim, "text_dim": WIDE.text_dim}
    sizes |= {"in_channels": WIDE.in_channels, "out_channels": WIDE.in_channels, "ffn_dim": WIDE.ffn_dim}
    sizes |= {"freq_dim": WIDE.freq_dim, "num_layers": WIDE.num_layers}
    for folder in (tmp_path / "config", tmp_path / "config" / "transformer"):
        (folder / "config.json").write_text(json.dumps({"_class_name": "WanTransformer3DModel", **sizes}))
    theirs = WanTransformer3DModel.from_single_file(
        str(tmp_path / "m.gguf"),
        quantization_config=GGUFQuantizationConfig(compute_dtype=torch.float32),
        config=str(tmp_path / "config"),
        subfolder="transformer",
        torch_dtype=torch.float32,
    )
    torch.manual_seed(0)
    latents, text = torch.randn(1, WIDE.in_channels, 2, 4, 4), torch.randn(1, WIDE.text_len, WIDE.text_dim)
    with torch.no_grad():
        expected = theirs(latents, torch.tensor([500.0]), text, return_dict=False)[0]
    made = run(load_model(tmp_path / "m.gguf", dtype=torch.float32), latents, torch.tensor([500.0, 500.0]), text)
    torch.testing.assert_close(made, expected, rtol=0, atol=1e-4 * expected.abs().max().item())


def test_a_broken_gguf_file_is_one_sentence(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", wide_state(), Type.Q8_0)
    whole = (tmp_path / "m.gguf").read_bytes()
    for broken in (whole[:100], whole[:3000], whole[: len(whole) // 2], b"GGUF" + b"\xff" * 500, b"GGUF\x03\0\0\0"):
        (tmp_path / "broken.gguf").write_bytes(broken)
        with pytest.raises(CheckpointError, match="truncated or not a GGUF file") as caught:
            load_model(tmp_path / "broken.gguf")
        assert "\n" not in str(caught.value)


def t5_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """transformers' names -> llama.cpp's, by the package's own table."""
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.T5ENCODER, text_files.LAYERS)
    named = {table.get_name(name, try_suffixes=(".weight",)): tensor for name, tensor in state.items()}
    assert None not in named
    return {name: tensor for name, tensor in named.items() if name is not None}


def test_umt5_in_gguf(tmp_path: Path) -> None:
    """With the names of llama.cpp, which the published encoders in GGUF have."""
    encoder = text_files.make_encoder()
    state = {name: parameter.detach() for name, parameter in encoder.named_parameters()}
    exact = write_gguf(tmp_path / "t5.gguf", t5_names(state), Type.F16, flat="")
    checkpoint = T5Checkpoint.open(tmp_path / "t5.gguf")
    read = checkpoint.read(torch.float32, torch.device("cpu"))
    wanted = t5_names(read)
    assert all(torch.equal(wanted[name], tensor) for name, tensor in exact.items())
    assert len(wanted) == len(exact)


def test_umt5_in_scaled_fp8_with_its_tokenizer_inside(tmp_path: Path) -> None:
    """As ComfyUI's umt5_xxl_fp8_e4m3fn_scaled.safetensors, which has the file of its tokenizer as a tensor."""
    state = {name: tensor.detach() for name, tensor in text_files.make_encoder().named_parameters()}
    exact = save_scaled_fp8(tmp_path / "t5.safetensors", state | {"spiece_model": torch.zeros(9, dtype=torch.uint8)})
    checkpoint = T5Checkpoint.open(tmp_path / "t5.safetensors")
    assert checkpoint.files.passed_by == ["spiece_model"]
    read = checkpoint.read(torch.float32, torch.device("cpu"))
    assert all(torch.equal(tensor, exact[name]) for name, tensor in read.items())


def test_a_codec_in_fp8(tmp_path: Path) -> None:
    source = next((WEIGHTS / "codec").glob("*.safetensors"))
    config = source.parent / "config.json"
    (tmp_path / "config.json").write_text(config.read_text())
    state = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in load_file(source).items()}
    save_file(state, tmp_path / "vae.safetensors")
    save_file({name: tensor.float() for name, tensor in state.items()}, tmp_path / "wide.safetensors")
    codecs = [load_codec(tmp_path / f"{name}.safetensors") for name in ("vae", "wide")]
    first, second = (codec.vae.state_dict() for codec in codecs)  # type: ignore[attr-defined]
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


PASSED = ["_extra_state", "num_updates", "model_ema.decay", "blocks.0.self_attn._extra_state", "n_averaged"]


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_what_is_no_weight_is_passed_by_and_listed(tmp_path: Path, suffix: str) -> None:
    state = wan_state()
    more = {name: torch.zeros(3, dtype=torch.uint8) for name in PASSED}
    file = tmp_path / f"m{suffix}"
    if suffix == ".pt":
        torch.save({**state, **more, "step": 1000, "betas": [0.9, 0.95], "note": "x"}, file)
        (tmp_path / "config.json").write_text(HEADS["config"])
    else:
        save_file(state | more, file, HEADS)
    load_model(file)
    shown = json.loads(shell("inspect", file, "--json").output)
    assert {*shown["passed_by"]} == {*PASSED, *(("step", "betas", "note") if suffix == ".pt" else ())}
    assert shown["unexpected"] == []


def test_a_model_of_this_library_is_no_less_strict(tmp_path: Path) -> None:
    save_model(load_model(save_wan(tmp_path / "a.safetensors", wan_state())), tmp_path / "m.safetensors")
    save_wan(tmp_path / "b.safetensors", wan_state() | {"blocks.0.extra.weight": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"1 unexpected: blocks\.0\.extra\.weight"):
        load_model(tmp_path / "b.safetensors")


def test_without_the_package_gguf_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_gguf(tmp_path / "m.gguf", wide_state(), Type.Q8_0)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(CheckpointError, match="a GGUF file, which needs the package gguf: pip install gguf"):
        load_model(tmp_path / "m.gguf")
