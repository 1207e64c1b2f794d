"""A small Open-Sora 1.2: the published models, each in the layout of its own repository, in one folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoTokenizer

from causalrope_sp.spatiotemporal.open_sora.open_sora_vae import CausalConv, TemporalDecoder
from tests.support.latte_folder import make_text, spread
from tests.support.open_sora_cases import write_model
from tests.support.text_files import save_tokenizer

SCALE, SHIFT = (3.85, 2.32, 2.33, 3.06), (-0.10, 0.34, 0.27, 0.98)


def make_picture_vae() -> AutoencoderKL:
    """A picture VAE of stride 8, with the 32 groups of the published one."""
    return AutoencoderKL(
        block_out_channels=(32, 32, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        layers_per_block=1,
    )


def temporal_state() -> dict[str, Tensor]:
    """The weights of a temporal decoder as `temporal-decoder.safetensors` was made with, by published names."""
    decoder, post = TemporalDecoder((32, 64, 64, 128), 1, (False, True, True), 4), CausalConv(4, 4, 1)
    state = {f"decoder.{name}": x for name, x in decoder.state_dict().items()}
    return seeded(state | {f"post_quant_conv.{name}": x for name, x in post.state_dict().items()})


def seeded(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Replaces tensors, in the order of their names, by random ones of a usual size."""
    generator, found = torch.Generator().manual_seed(0), {}
    for name in sorted(state):
        drawn = torch.randn(state[name].shape, generator=generator, dtype=torch.float64)
        fan = state[name][0].numel() if state[name].ndim > 1 else 1
        found[name] = (1 + 0.2 * drawn if "norm" in name and name.endswith("weight") else drawn / fan**0.5).float()
    return found


def save_vae(folder: Path) -> AutoencoderKL:
    """Writes the VAE, with encoders that are not needed, and returns its picture VAE."""
    torch.manual_seed(0)
    picture = spread(make_picture_vae())
    assert isinstance(picture, AutoencoderKL)
    state = {f"spatial_vae.module.{name}": x for name, x in picture.state_dict().items()}
    state |= {f"temporal_vae.{name}": x for name, x in temporal_state().items()}
    encoders = ("temporal_vae.encoder.conv_in.conv.weight", "temporal_vae.quant_conv.conv.bias")
    state |= {name: torch.zeros(1) for name in encoders}
    state |= {"scale": torch.tensor(SCALE).view(1, 4, 1, 1, 1), "shift": torch.tensor(SHIFT).view(1, 4, 1, 1, 1)}
    folder.mkdir(parents=True)
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "VideoAutoencoderPipeline"}))
    return picture


def save_open_sora_folder(cases: Path, folder: Path) -> Path:
    """Writes the folder, with the transformer of the reference cases, and returns it."""
    (folder / "transformer").mkdir(parents=True)
    write_model(cases, folder / "transformer")
    save_vae(folder / "vae")
    AutoTokenizer.from_pretrained(save_tokenizer(folder / "tokenizer"))
    torch.manual_seed(0)
    make_text(32).save_pretrained(folder / "text_encoder")
    return folder
