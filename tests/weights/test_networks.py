"""One rule for prefixes: transformer, text encoder and codec are read from files of one network or of several."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from causalrope_sp import CheckpointError
from causalrope_sp.codec.codec_loader import load_codec
from causalrope_sp.text.umt5_checkpoint import T5Checkpoint
from causalrope_sp.toybox import WEIGHTS
from causalrope_sp.weights import inspect_checkpoint, load_model
from tests.support import text_files
from tests.support.checkpoints import save_wan, wan_state

PREFIXES = {
    "ComfyUI": ("model.diffusion_model.", "text_encoders.umt5xxl.transformer.", "vae."),
    "of a pipeline": ("transformer.", "text_encoder.", "vae."),
    "Lightning": ("model.dit.", "model.text.", "model.vae."),
    "transformer alone without": ("", "cond_stage_model.", "first_stage_model."),
    "encoder without": ("net.", "", "vae."),
    "wrapped": ("model._fsdp_wrapped_module.", "text_encoder._orig_mod.", "vae.module."),
}


@pytest.fixture(scope="module")
def vae() -> dict[str, Tensor]:
    return load_file(next((WEIGHTS / "codec").glob("*.safetensors")))


def t5(layout: str) -> dict[str, Tensor]:
    encoder = text_files.make_encoder()
    if layout == "wan":
        return text_files.wan_state(encoder)
    return {name: tensor.detach() for name, tensor in encoder.named_parameters()}


def save(file: Path, vae: dict[str, Tensor], prefixes: tuple[str, str, str], layout: str) -> Path:
    parts = zip(prefixes, (wan_state(), t5(layout), vae), strict=True)
    return save_wan(
        file, {prefix + name: tensor.contiguous() for prefix, part in parts for name, tensor in part.items()}
    )


@pytest.mark.parametrize("layout", ["transformers", "wan"])
@pytest.mark.parametrize("name", PREFIXES)
def test_each_network_of_an_all_in_one_file(tmp_path: Path, vae: dict[str, Tensor], name: str, layout: str) -> None:
    if (name, layout) == ("encoder without", "wan"):
        layout = "transformers"  # Wan's own names of an encoder's blocks are those of a transformer's
    file = save(tmp_path / "all.safetensors", vae, PREFIXES[name], layout)
    model = load_model(file)
    (tmp_path / "lone").mkdir()
    for key, tensor in load_model(save_wan(tmp_path / "lone" / "m.safetensors", wan_state())).state_dict().items():
        assert torch.equal(tensor, model.state_dict()[key]), key
    read = T5Checkpoint.open(file).read(torch.float32, torch.device("cpu"))
    for key, parameter in text_files.make_encoder().named_parameters():
        assert torch.equal(read[key], parameter), key
    (tmp_path / "config.json").write_text((WEIGHTS / "codec" / "config.json").read_text())
    state = load_codec(file).vae.state_dict()  # type: ignore[attr-defined]
    assert all(torch.equal(state[key], tensor.float()) for key, tensor in vae.items())


def test_inspect_lists_the_other_networks(tmp_path: Path, vae: dict[str, Tensor]) -> None:
    file = save(tmp_path / "all.safetensors", vae, PREFIXES["ComfyUI"], "transformers")
    report = inspect_checkpoint(file)
    assert report.problem is None
    assert report.wrapping.prefix == "model.diffusion_model."
    assert report.wrapping.auxiliary == ("text_encoders.umt5xxl.transformer.", "vae.")


@pytest.mark.parametrize("prefix", ["", "vae.", "first_stage_model.", "module.", "model.vae._orig_mod."])
def test_a_codec_under_a_prefix(tmp_path: Path, vae: dict[str, Tensor], prefix: str) -> None:
    (tmp_path / "config.json").write_text((WEIGHTS / "codec" / "config.json").read_text())
    save_file({prefix + name: tensor for name, tensor in vae.items()}, tmp_path / "vae.safetensors")
    load_codec(tmp_path / "vae.safetensors")
    save_file(
        {prefix + name: tensor for name, tensor in (vae | {"x.y": torch.zeros(1)}).items()},
        tmp_path / "vae.safetensors",
    )
    with pytest.raises(CheckpointError, match=r"1 unexpected: x\.y"):
        load_codec(tmp_path / "vae.safetensors")


@pytest.mark.parametrize("key", ["ema", "params", "weights_of_my_trainer"])
def test_a_lone_dictionary_of_any_name_is_opened(tmp_path: Path, key: str) -> None:
    torch.save({key: wan_state(), "step": 1000, "config": {"lr": 0.1}}, tmp_path / "m.pt")
    (tmp_path / "config.json").write_text('{"num_heads": 3}')
    load_model(tmp_path / "m.pt")


def test_a_lone_critic_is_no_model(tmp_path: Path) -> None:
    torch.save({"critic": wan_state(), "step": 1000}, tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match="critic is a dict, not a tensor"):
        load_model(tmp_path / "m.pt")
