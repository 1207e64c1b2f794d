"""Loading of a Latte DiT from a folder of diffusers' `LatteTransformer3DModel`."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

import torch

from causalrope_sp.spatiotemporal.latte.latte_config import LatteConfig
from causalrope_sp.spatiotemporal.latte.latte_dit import LatteDiT
from causalrope_sp.spatiotemporal.weights import StoredModel, load_dit
from causalrope_sp.weights.key_layout import Names, linear
from causalrope_sp.weights.tensor_files import WeightFiles


def load_latte(
    path: str | PathLike[str], *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> LatteDiT:
    """Loads the model of a folder that holds config.json and the weights.

    Args:
        path: the folder.
        dtype: the model's dtype; None keeps the one of most of the checkpoint's numbers.
        device: the model's device.

    Returns:
        The model in eval mode, without gradients.

    Raises:
        CheckpointError: the folder cannot be read, holds another kind of model, or a tensor is missing, unexpected, of
            a wrong shape, or holds NaN or infinity.
        ConfigError: a size is impossible, or `dtype` is not a floating-point dtype.
    """
    files = WeightFiles(Path(path))
    config = LatteConfig.of_diffusers(files.declared_config())
    stored = StoredModel(
        kind="Latte, diffusers layout",
        names=lambda: _names(config),
        patch=(config.dim, config.in_channels, config.patch_size, config.patch_size),
        layers=config.num_layers,
        layer_marker=("transformer_blocks.", ".scale_shift_table"),
    )
    return load_dit(files, Path(path), stored, lambda: LatteDiT(config), dtype, device)


def _names(config: LatteConfig) -> Names:
    """Returns every parameter of the model with its stored names."""
    names = {
        **linear("patch_embedding", "pos_embed.proj"),
        **linear("text_embedding.0", "caption_projection.linear_1"),
        **linear("text_embedding.2", "caption_projection.linear_2"),
        **linear("time_embedding.0", "adaln_single.emb.timestep_embedder.linear_1"),
        **linear("time_embedding.2", "adaln_single.emb.timestep_embedder.linear_2"),
        **linear("time_projection.1", "adaln_single.linear"),
        **linear("head", "proj_out"),
        "head_modulation": ("scale_shift_table",),
    }
    for layer in range(config.num_layers):
        spatial = f"transformer_blocks.{layer}"
        for block, stored in ((f"spatial.{layer}", spatial), (f"temporal.{layer}", f"temporal_{spatial}")):
            names |= {f"{block}.modulation": (f"{stored}.scale_shift_table",)}
            names |= linear(f"{block}.attn.qkv", *(f"{stored}.attn1.to_{x}" for x in "qkv"))
            names |= linear(f"{block}.attn.out", f"{stored}.attn1.to_out.0")
            names |= linear(f"{block}.ffn.up", f"{stored}.ff.net.0.proj")
            names |= linear(f"{block}.ffn.down", f"{stored}.ff.net.2")
        names |= linear(f"spatial.{layer}.cross_attn.q", f"{spatial}.attn2.to_q")
        names |= linear(f"spatial.{layer}.cross_attn.kv", *(f"{spatial}.attn2.to_{x}" for x in "kv"))
        names |= linear(f"spatial.{layer}.cross_attn.out", f"{spatial}.attn2.to_out.0")
    if not config.attention_bias:
        unbiased = (".qkv.bias", "cross_attn.q.bias", "cross_attn.kv.bias")
        names = {name: made_of for name, made_of in names.items() if not name.endswith(unbiased)}
    return names
