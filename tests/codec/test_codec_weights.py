"""Codecs from files: which one it is, by its content, and one line on what is wrong with it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan
from safetensors.torch import save_file
from torch import Tensor

from causalrope_sp import CheckpointError, ConfigError
from causalrope_sp.codec import load_codec
from causalrope_sp.codec.wan_vae import WanCodec
from causalrope_sp.codec.wan_vae_config import WAN_2_2, WanVaeConfig
from causalrope_sp.codec.wan_vae_weights import infer_config, wan_modules
from causalrope_sp.toybox import WEIGHTS
from causalrope_sp.weights.tensor_files import WeightFiles
from tests.support.codecs import wan_vae_like

# Names as Wan's own file has them, written down by hand, beside diffusers' for the same tensor.
KNOWN_NAMES = {
    "conv1.weight": "quant_conv.weight",
    "conv2.bias": "post_quant_conv.bias",
    "encoder.conv1.weight": "encoder.conv_in.weight",
    "encoder.downsamples.0.residual.0.gamma": "encoder.down_blocks.0.norm1.gamma",
    "encoder.downsamples.2.resample.1.weight": "encoder.down_blocks.2.resample.1.weight",
    "encoder.downsamples.3.shortcut.weight": "encoder.down_blocks.3.conv_shortcut.weight",
    "encoder.downsamples.5.time_conv.bias": "encoder.down_blocks.5.time_conv.bias",
    "encoder.downsamples.10.residual.6.weight": "encoder.down_blocks.10.conv2.weight",
    "encoder.middle.0.residual.3.gamma": "encoder.mid_block.resnets.0.norm2.gamma",
    "encoder.middle.1.to_qkv.weight": "encoder.mid_block.attentions.0.to_qkv.weight",
    "encoder.head.2.bias": "encoder.conv_out.bias",
    "decoder.middle.2.residual.2.bias": "decoder.mid_block.resnets.1.conv1.bias",
    "decoder.middle.1.norm.gamma": "decoder.mid_block.attentions.0.norm.gamma",
    "decoder.upsamples.2.residual.6.bias": "decoder.up_blocks.0.resnets.2.conv2.bias",
    "decoder.upsamples.3.time_conv.weight": "decoder.up_blocks.0.upsamplers.0.time_conv.weight",
    "decoder.upsamples.4.shortcut.weight": "decoder.up_blocks.1.resnets.0.conv_shortcut.weight",
    "decoder.upsamples.11.resample.1.bias": "decoder.up_blocks.2.upsamplers.0.resample.1.bias",
    "decoder.upsamples.14.residual.0.gamma": "decoder.up_blocks.3.resnets.2.norm1.gamma",
    "decoder.head.0.gamma": "decoder.norm_out.gamma",
}

# The same of Wan 2.2's file, which groups layers by stage.
KNOWN_NAMES_2_2 = {
    "conv1.bias": "quant_conv.bias",
    "conv2.weight": "post_quant_conv.weight",
    "encoder.conv1.bias": "encoder.conv_in.bias",
    "encoder.downsamples.0.downsamples.0.residual.0.gamma": "encoder.down_blocks.0.resnets.0.norm1.gamma",
    "encoder.downsamples.0.downsamples.2.resample.1.weight": "encoder.down_blocks.0.downsampler.resample.1.weight",
    "encoder.downsamples.1.downsamples.0.shortcut.weight": "encoder.down_blocks.1.resnets.0.conv_shortcut.weight",
    "encoder.downsamples.2.downsamples.2.time_conv.bias": "encoder.down_blocks.2.downsampler.time_conv.bias",
    "encoder.downsamples.3.downsamples.1.residual.6.weight": "encoder.down_blocks.3.resnets.1.conv2.weight",
    "encoder.middle.1.proj.weight": "encoder.mid_block.attentions.0.proj.weight",
    "encoder.head.2.weight": "encoder.conv_out.weight",
    "decoder.middle.2.residual.2.bias": "decoder.mid_block.resnets.1.conv1.bias",
    "decoder.upsamples.0.upsamples.2.residual.3.gamma": "decoder.up_blocks.0.resnets.2.norm2.gamma",
    "decoder.upsamples.0.upsamples.3.time_conv.weight": "decoder.up_blocks.0.upsampler.time_conv.weight",
    "decoder.upsamples.2.upsamples.3.resample.1.bias": "decoder.up_blocks.2.upsampler.resample.1.bias",
    "decoder.upsamples.3.upsamples.0.shortcut.bias": "decoder.up_blocks.3.resnets.0.conv_shortcut.bias",
    "decoder.head.0.gamma": "decoder.norm_out.gamma",
}


def small_vae() -> AutoencoderKLWan:
    """Wan 2.1's own shape, narrow: four stages of two blocks, time halved in the last two of three."""
    torch.manual_seed(0)
    return AutoencoderKLWan(base_dim=4).eval().requires_grad_(False)


def small_vae_2_2() -> AutoencoderKLWan:
    """Wan 2.2's own shape, narrow: its 48 latent channels, shortcuts, patches of 2×2, a decoder that is wider."""
    torch.manual_seed(0)
    fields = {**WAN_2_2.as_json(), "base_dim": 4, "decoder_base_dim": 6}
    return AutoencoderKLWan(**fields).eval().requires_grad_(False)


def under_wan_names(vae: AutoencoderKLWan) -> dict[str, Tensor]:
    config = vae.config
    modules = wan_modules(len(config.dim_mult), config.num_res_blocks, config.is_residual)
    by_length = sorted(modules, key=len, reverse=True)
    renamed = {}
    for name, tensor in vae.state_dict().items():
        module = next((m for m in by_length if name.startswith(f"{m}.")), None)
        renamed[name if module is None else modules[module] + name[len(module) :]] = tensor
    return renamed


@pytest.fixture
def wan_file(tmp_path: Path) -> Path:
    torch.save(under_wan_names(small_vae()), tmp_path / "Wan2.1_VAE.pth")
    return tmp_path / "Wan2.1_VAE.pth"


def test_the_names_are_those_of_the_public_file() -> None:
    vae = AutoencoderKLWan.from_config({"base_dim": 4})
    state, renamed = vae.state_dict(), under_wan_names(vae)
    assert len(renamed) == len(state) == 194
    for stored, name in KNOWN_NAMES.items():
        assert renamed[stored] is not None
        assert renamed[stored].data_ptr() == state[name].data_ptr()
    assert not [name for name in renamed if "block" in name or "resnets" in name or "norm1" in name]


def test_wan_2_2s_names_are_those_of_the_public_file() -> None:
    vae = small_vae_2_2()
    state, renamed = vae.state_dict(), under_wan_names(vae)
    assert len(renamed) == len(state) == 196
    for stored, name in KNOWN_NAMES_2_2.items():
        assert renamed[stored].data_ptr() == state[name].data_ptr()
    assert not [name for name in renamed if "block" in name or "resnets" in name or "sampler." in name]


def test_wan_2_2s_file_is_the_vae_that_diffusers_has(tmp_path: Path) -> None:
    """Both ways, in pieces, against diffusers' own numbers, with the statistics that are published for 48 channels."""
    theirs = small_vae_2_2()
    torch.save(under_wan_names(theirs), tmp_path / "Wan2.2_VAE.pth")
    codec = load_codec(tmp_path / "Wan2.2_VAE.pth")
    assert isinstance(codec, WanCodec)
    assert (codec.channels, codec.temporal_stride, codec.spatial_stride) == (48, 4, 16)
    assert codec.vae.config == WanVaeConfig.from_json(theirs.config)
    mean, std = (torch.tensor(theirs.config[key]).view(1, -1, 1, 1, 1) for key in ("latents_mean", "latents_std"))
    latents, pixels = torch.randn(1, 3, 48, 2, 3), torch.rand(1, 9, 3, 32, 48) * 2 - 1
    decoder, encoder = codec.decoder(), codec.encoder()
    decoded = torch.cat([decoder.decode(part) for part in latents.split([1, 2], 1)], 1)
    encoded = torch.cat([encoder.encode(part) for part in pixels.split([5, 4], 1)], 1)
    expected = theirs.decode(latents.transpose(1, 2) * std + mean).sample.transpose(1, 2)
    torch.testing.assert_close(decoded.clamp(-1, 1), expected, rtol=0, atol=1e-5)
    expected = (theirs.encode(pixels.transpose(1, 2)).latent_dist.mode() - mean) / std
    torch.testing.assert_close(encoded, expected.transpose(1, 2), rtol=1e-4, atol=1e-5)


def test_wans_file_is_the_vae_that_diffusers_has(wan_file: Path) -> None:
    vae, codec = small_vae(), load_codec(wan_file, "wan")
    assert isinstance(codec, WanCodec)
    assert (codec.channels, codec.temporal_stride, codec.spatial_stride) == (16, 4, 8)
    for key in ("latents_mean", "latents_std", "temperal_downsample", "dim_mult", "num_res_blocks", "patch_size"):
        expected = vae.config[key]
        assert getattr(codec.vae.config, key) == (tuple(expected) if isinstance(expected, list) else expected)
    latents = torch.randn(1, 2, 16, 2, 2)
    assert torch.equal(codec.decoder().decode(latents), WanCodec(wan_vae_like(vae)).decoder().decode(latents))


def test_another_shape_is_read_off_the_tensors(tmp_path: Path) -> None:
    stored = {
        "base_dim": 4,
        "decoder_base_dim": 6,
        "z_dim": 3,
        "dim_mult": [1, 3],
        "num_res_blocks": 1,
        "temperal_downsample": [True],
        "is_residual": False,
        "in_channels": 12,
        "out_channels": 12,
        "patch_size": 2,
        "scale_factor_temporal": 2,
        "scale_factor_spatial": 4,
        "latents_mean": [1.0, 2.0, 3.0],
        "latents_std": [0.5, 1.5, 2.5],
    }
    save_file(under_wan_names(AutoencoderKLWan(**stored)), tmp_path / "vae.safetensors")
    with pytest.raises(CheckpointError, match="does not say latents_mean and latents_std of its 3 channels"):
        load_codec(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({k: stored[k] for k in ("latents_mean", "latents_std")}))
    assert infer_config(WeightFiles(tmp_path)) == stored
    codec = load_codec(tmp_path / "vae.safetensors")
    assert (codec.channels, codec.temporal_stride, codec.spatial_stride) == (3, 2, 4)


def test_diffusers_folder_and_its_file_are_the_same() -> None:
    latents = torch.randn(1, 2, 16, 2, 2)
    folder, file = (load_codec(WEIGHTS / "codec" / name) for name in ("", "diffusion_pytorch_model.safetensors"))
    assert torch.equal(folder.decoder().decode(latents), file.decoder().decode(latents))
    assert folder.dtype == torch.float32


def dropped(state: dict[str, Tensor]) -> None:
    del state["decoder.head.2.bias"]


def added(state: dict[str, Tensor]) -> None:
    state["decoder.tail.weight"] = torch.zeros(2)


def misshapen(state: dict[str, Tensor]) -> None:
    state["conv1.bias"] = torch.zeros(31)


def of_integers(state: dict[str, Tensor]) -> None:
    state["conv1.bias"] = torch.zeros(32, dtype=torch.int8)


def infinite(state: dict[str, Tensor]) -> None:
    state["conv1.bias"] = torch.full((32,), torch.inf)


def unreadable(state: dict[str, Tensor]) -> None:
    del state["encoder.conv1.weight"]


def nested(state: dict[str, Tensor]) -> None:
    """Stages within stages, as Wan 2.2 has them, and one stage alone."""
    for name in list(state):
        if name.startswith("encoder.downsamples"):
            state[name.replace("downsamples", "downsamples.0.downsamples", 1)] = state.pop(name)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (dropped, "1 missing: decoder.head.2.bias"),
        (infinite, "1 NaN or infinite in float32: conv1.bias"),
        (added, "1 unexpected: decoder.tail.weight"),
        (misshapen, r"1 of a wrong shape: conv1.bias is \(31,\), expected \(32,\)"),
        (of_integers, "1 not of floating point: conv1.bias"),
        (unreadable, "1 missing: encoder.conv1.weight"),
        (nested, "1 missing: encoder.downsamples.1.downsamples.0.residual.6.weight"),
        (lambda state: state.clear(), "of no known layout"),
    ],
)
def test_a_file_that_does_not_fit_is_one_line(
    wan_file: Path, change: Callable[[dict[str, Tensor]], None], says: str
) -> None:
    state = torch.load(wan_file)
    change(state)
    torch.save(state, wan_file)
    with pytest.raises(CheckpointError, match=f"cannot read the codec: .*Wan2.1_VAE.pth.*{says}") as caught:
        load_codec(wan_file)
    assert "\n" not in str(caught.value)


def test_what_is_no_codec_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"of no known layout \(decoder.mid_block.*its keys are .* and \d+ more"):
        load_codec(WEIGHTS / "toybox.safetensors")
    with pytest.raises(CheckpointError, match="no such file"):
        load_codec(tmp_path / "none.pth")
    with pytest.raises(ConfigError, match="unknown codec 'mp3'"):
        load_codec(WEIGHTS / "codec", "mp3")
    (tmp_path / "diffusion_pytorch_model.safetensors").symlink_to(
        WEIGHTS / "codec" / "diffusion_pytorch_model.safetensors"
    )
    with pytest.raises(CheckpointError, match=r"needs the config\.json beside it"):
        load_codec(tmp_path)
    (tmp_path / "config.json").write_text('{"base_dim": "wide"}')
    with pytest.raises(CheckpointError, match="declares a VAE that cannot be") as caught:
        load_codec(tmp_path)
    assert "\n" not in str(caught.value)
