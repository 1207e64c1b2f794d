"""Writing of a model to files that other Wan code reads."""

from __future__ import annotations

import json
from dataclasses import asdict
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from causalrope_sp.config import DiTConfig
from causalrope_sp.errors import ConfigError
from causalrope_sp.io.saved_tensors import save_tensors
from causalrope_sp.weights.diffusers_keys import DIFFUSERS
from causalrope_sp.weights.fp8 import is_fp8
from causalrope_sp.weights.key_layout import stored_tensors
from causalrope_sp.weights.wan_keys import WAN

if TYPE_CHECKING:
    from causalrope_sp.models.causal_dit import CausalDiT


def save_diffusers(model: CausalDiT, folder: str | PathLike[str]) -> None:
    """Writes a model as a folder of diffusers' `WanTransformer3DModel`: config.json and one safetensors file.

    diffusers' loader reads the folder back. A `text_len` other than Wan's 512 is written as a field that diffusers'
    class does not have.

    Args:
        model: a model with full weights.
        folder: the folder, which is made if it does not exist.

    Raises:
        ConfigError: the model's weights are in fp8, which no layout has.
    """
    if is_fp8(model):
        raise ConfigError("a model with fp8 weights cannot be saved; load it with weights='full'")
    config, home = model.config, Path(folder)
    home.mkdir(parents=True, exist_ok=True)
    for stale in home.glob("diffusion_pytorch_model*"):  # shards of an earlier model; diffusers deletes them too
        if ".safetensors" in stale.suffixes or stale.suffix == ".json":
            stale.unlink()
    declared = {
        "_class_name": "WanTransformer3DModel",
        "patch_size": list(config.patch_size),
        "num_attention_heads": config.num_heads,
        "attention_head_dim": config.head_dim,
        "in_channels": config.embedded_channels,
        "out_channels": config.in_channels,
        "text_dim": config.text_dim,
        "freq_dim": config.freq_dim,
        "ffn_dim": config.ffn_dim,
        "num_layers": config.num_layers,
        "image_dim": config.image_dim or None,
        "added_kv_proj_dim": config.dim if config.image_dim else None,
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "eps": config.eps,
        "rope_max_seq_len": 1024,
    }
    own = {"text_len": config.text_len} if config.text_len != DiTConfig.text_len else {}
    (home / "config.json").write_text(json.dumps({**declared, **own}, indent=2) + "\n")
    stored = stored_tensors(DIFFUSERS, config, model.state_dict())
    save_tensors(stored, home / "diffusion_pytorch_model.safetensors", {"format": "pt"})


def save_model(model: CausalDiT, path: str | PathLike[str]) -> None:
    """Writes a model as one safetensors file under Wan's own names, with its configuration in the metadata.

    Args:
        model: a model with full weights.
        path: the file.

    Raises:
        ConfigError: the model's weights are in fp8, which no layout has.
        OutputError: a folder, a device or a pipe has the path.
    """
    if is_fp8(model):
        raise ConfigError("a model with fp8 weights cannot be saved; load it with weights='full'")
    metadata = {"layout": WAN.name, "config": json.dumps(asdict(model.config))}
    save_tensors(stored_tensors(WAN, model.config, model.state_dict()), path, metadata)
