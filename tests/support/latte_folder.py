"""A small Latte in the layout of diffusers' `LattePipeline`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, LattePipeline, LatteTransformer3DModel
from torch import nn
from transformers import AutoTokenizer, T5Config, T5EncoderModel

from tests.support.text_files import save_tokenizer

SIZES: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 2,
    "cross_attention_dim": 24,
    "attention_bias": True,
    "sample_size": 8,
    "patch_size": 2,
    "activation_fn": "gelu-approximate",
    "norm_type": "ada_norm_single",
    "norm_elementwise_affine": False,
    "norm_eps": 1e-6,
    "caption_channels": 10,
    "video_length": 5,
}


def make_vae() -> AutoencoderKL:
    """A picture VAE of stride 8."""
    return AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=4,
        layers_per_block=1,
    )


def make_text(width: int) -> T5EncoderModel:
    """A T5 encoder for the tests' tokenizer."""
    return T5EncoderModel(
        T5Config(
            vocab_size=250, d_model=width, d_kv=4, d_ff=16, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu"
        )
    )


def spread(model: nn.Module) -> nn.Module:
    """Makes the weights larger, so that every part shows in the result."""
    for parameter in model.parameters():
        parameter.data.mul_(1.3)
    return model


def save_latte_folder(folder: Path, scheduler: Any = None) -> Path:
    """Writes the folder and returns it."""
    tokenizer = AutoTokenizer.from_pretrained(save_tokenizer(folder / "tokenizer"))
    torch.manual_seed(0)
    parts = spread(make_text(10)), spread(make_vae()), spread(LatteTransformer3DModel(**SIZES))
    chosen = scheduler or DDIMScheduler(beta_schedule="linear", clip_sample=False)
    LattePipeline(tokenizer, *parts, chosen).save_pretrained(folder)
    return folder
