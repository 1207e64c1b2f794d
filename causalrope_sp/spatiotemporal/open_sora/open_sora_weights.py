"""Loading of an Open-Sora 1.2 DiT from a folder with the published names (hpcai-tech/OpenSora-STDiT-v3)."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

import torch

from causalrope_sp.spatiotemporal.open_sora.open_sora_config import OpenSoraConfig
from causalrope_sp.spatiotemporal.open_sora.open_sora_dit import OpenSoraDiT
from causalrope_sp.spatiotemporal.weights import StoredModel, load_dit
from causalrope_sp.weights.key_layout import Names, linear
from causalrope_sp.weights.tensor_files import WeightFiles


def load_open_sora(
    path: str | PathLike[str], *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> OpenSoraDiT:
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
    config = OpenSoraConfig.of_published(files.declared_config())
    stored = StoredModel(
        kind="Open-Sora 1.2",
        names=lambda: _names(config),
        patch=(config.hidden_size, config.in_channels, 1, config.patch_size, config.patch_size),
        layers=config.depth,
        layer_marker=("spatial_blocks.", ".scale_shift_table"),
        ignored=("rope.freqs",),  # the rotary frequencies, which are computed
    )
    return load_dit(files, Path(path), stored, lambda: OpenSoraDiT(config), dtype, device)


def _names(config: OpenSoraConfig) -> Names:
    """Returns every parameter of the model with its stored names."""
    names = {
        **linear("patch_embedding", "x_embedder.proj"),
        **linear("text_embedding.0", "y_embedder.y_proj.fc1"),
        **linear("text_embedding.2", "y_embedder.y_proj.fc2"),
        **linear("time_projection.1", "t_block.1"),
        **linear("head", "final_layer.linear"),
        "head_modulation": ("final_layer.scale_shift_table",),
        "null_text": ("y_embedder.y_embedding",),
    }
    for ours, theirs in (("time_embedding", "t_embedder"), ("fps_embedding", "fps_embedder")):
        for number in (0, 2):
            names |= linear(f"{ours}.{number}", f"{theirs}.mlp.{number}")
    for kind in ("spatial", "temporal"):
        for layer in range(config.depth):
            block, stored = f"{kind}.{layer}", f"{kind}_blocks.{layer}"
            names |= {f"{block}.modulation": (f"{stored}.scale_shift_table",)}
            names |= {f"{block}.attn.norm_{x}.weight": (f"{stored}.attn.{x}_norm.weight",) for x in "qk"}
            for ours, theirs in (
                ("attn.qkv", "attn.qkv"),
                ("attn.out", "attn.proj"),
                ("cross_attn.q", "cross_attn.q_linear"),
                ("cross_attn.kv", "cross_attn.kv_linear"),
                ("cross_attn.out", "cross_attn.proj"),
                ("ffn.up", "mlp.fc1"),
                ("ffn.down", "mlp.fc2"),
            ):
                names |= linear(f"{block}.{ours}", f"{stored}.{theirs}")
    return names
