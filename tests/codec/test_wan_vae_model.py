"""The Wan VAE's files and configuration: diffusers writes what is read and reads what is written."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan

from causalrope_sp import ConfigError
from causalrope_sp.codec import load_codec
from causalrope_sp.codec.wan_vae_config import WanVaeConfig
from causalrope_sp.codec.wan_vae_model import WanVae, patchify, unpatchify
from tests.support.codecs import small_wan_vae

CONFIGS: list[dict[str, Any]] = [
    {"base_dim": 4},
    {"base_dim": 4, "decoder_base_dim": 6, "attn_scales": [1.0, 0.5], "dropout": 0.1},
    {"base_dim": 4, "num_res_blocks": 1, "dim_mult": [2, 1, 3], "temperal_downsample": [True, False]},
    {"base_dim": 4, "is_residual": True, "patch_size": 2, "in_channels": 12, "out_channels": 12},
]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_tensors_and_fields_are_diffusers_own(config: dict[str, Any]) -> None:
    with torch.device("meta"):
        theirs, ours = AutoencoderKLWan(**config), WanVae(WanVaeConfig.from_json(config))
    shapes = [{name: tuple(tensor.shape) for name, tensor in vae.state_dict().items()} for vae in (theirs, ours)]
    assert shapes[0] == shapes[1]
    assert ours.config.as_json() == {name: theirs.config[name] for name in ours.config.as_json()}


@pytest.mark.parametrize("residual", [False, True])
def test_a_folder_goes_both_ways(residual: bool, tmp_path: Path) -> None:
    theirs = small_wan_vae(residual)
    theirs.save_pretrained(tmp_path / "theirs")
    codec: Any = load_codec(tmp_path / "theirs")
    latents = torch.randn(1, 4, codec.channels, 3, 2)
    before = codec.decoder().decode(latents)
    codec.vae.save_pretrained(tmp_path / "ours")
    back = AutoencoderKLWan.from_pretrained(tmp_path / "ours")
    assert back.state_dict().keys() == theirs.state_dict().keys()
    assert all(torch.equal(tensor, theirs.state_dict()[name]) for name, tensor in back.state_dict().items())
    fields = json.loads((tmp_path / "ours" / "config.json").read_text())
    expected = json.loads((tmp_path / "theirs" / "config.json").read_text())
    assert fields == {name: value for name, value in expected.items() if name != "_diffusers_version"}
    assert torch.equal(load_codec(tmp_path / "ours").decoder().decode(latents), before)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"base_dim": "wide"}, "base_dim: expected a whole number above 0, got 'wide'"),
        ({"z_dim": 0}, "z_dim: expected a whole number above 0, got 0"),
        ({"z_dim": 8}, "latents_mean: expected 8 numbers"),
        ({"latents_std": [0.0] * 16}, "latents_std: expected numbers above 0"),
        ({"dim_mult": []}, "dim_mult: expected whole numbers above 0"),
        ({"dim_mult": 4}, "dim_mult: expected a list, got 4"),
        ({"dim_mult": [1, 2.5]}, "dim_mult: expected whole numbers above 0"),
        ({"temperal_downsample": [True]}, "temperal_downsample: expected 3 of true or false"),
        ({"temperal_downsample": [1, 1, 1]}, "temperal_downsample: expected 3 of true or false"),
        ({"patch_size": -2}, "patch_size: expected a whole number above 0 or null"),
        ({"attn_scales": ["half"]}, "attn_scales: expected numbers"),
        ({"patch_size": 2}, "in_channels: expected a multiple of 4"),
        ({"is_residual": True, "base_dim": 3, "dim_mult": [1, 5, 2, 2]}, "dim_mult: expected"),
    ],
)
def test_a_configuration_that_cannot_be_is_one_sentence(given: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        WanVaeConfig.from_json(given)
    assert str(caught.value).startswith(says)
    assert "\n" not in str(caught.value)


def test_patches_are_diffusers_own() -> None:
    from diffusers.models.autoencoders import autoencoder_kl_wan as theirs

    video = torch.randn(1, 3, 2, 8, 12)
    patches = theirs.patchify(video, 2)
    assert torch.equal(patchify(video[0].transpose(0, 1), 2), patches[0].transpose(0, 1))
    assert torch.equal(unpatchify(patches[0].transpose(0, 1), 2), video[0].transpose(0, 1))


def test_toybox_needs_no_diffusers() -> None:
    """Importing diffusers' VAE costs more than a short video."""
    code = (
        "import sys; from causalrope_sp import CausalVideoPipeline as Pipeline;"
        "pipe = Pipeline.from_pretrained('toybox', device='cpu');"
        "print(len(list(pipe.stream('a red circle bounces', num_frames=9))),"
        "sorted({'diffusers', 'transformers', 'scipy'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1", "[]"]
