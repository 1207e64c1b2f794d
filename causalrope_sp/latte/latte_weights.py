"""Loading of a Latte DiT from a folder of diffusers' `LatteTransformer3DModel`."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

import torch
from torch import Tensor

from causalrope_sp.devices import on_meta
from causalrope_sp.errors import CheckpointError, ConfigError
from causalrope_sp.latte.latte_config import LatteConfig
from causalrope_sp.latte.latte_dit import LatteDiT
from causalrope_sp.weights.finite import all_finite, refuse_broken
from causalrope_sp.weights.key_layout import Names, linear
from causalrope_sp.weights.messages import one_line, problem
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
    layers = sum(
        name.startswith("transformer_blocks.") and name.endswith(".scale_shift_table") for name in files.tensors
    )
    if config.num_layers != layers:
        raise CheckpointError(f"{path} (Latte): declares {config.num_layers} layers, its weights have {layers}")
    try:
        with on_meta():
            model = LatteDiT(config)
    except (RuntimeError, TypeError, OverflowError) as error:
        raise CheckpointError(f"{path} (Latte): declares a model that cannot be built: {one_line(error)}") from error
    names = _names(config)
    shapes = {n: p.shape for n, p in model.named_parameters()}
    wanted = {stored for made_of in names.values() for stored in made_of}
    present = set(files.tensors)
    misshapen = []
    for parameter, made_of in names.items():
        expected = _stored_shape(parameter, shapes[parameter], len(made_of), config)
        found = {stored: files.tensors[stored].shape for stored in made_of if stored in present}
        misshapen += [
            f"{stored} is {shape}, expected {expected}" for stored, shape in found.items() if shape != expected
        ]
    wrong = problem(sorted(wanted - present), sorted(present - wanted), misshapen)
    if wrong:
        raise CheckpointError(f"{path} (Latte, diffusers layout): {wrong}")
    usual = files.numbers(wanted).most_common(1)[0][0]
    dtype = dtype or usual
    if not dtype.is_floating_point:
        raise ConfigError(f"a model computes in a floating-point dtype, not in {dtype}")
    state: dict[str, Tensor] = {}
    for parameter, made_of in names.items():
        joined = torch.cat([_as_linear(parameter, files.take(stored)) for stored in made_of])
        state[parameter] = joined.to(device, dtype, copy=True)
    broken = [name for name, tensor in state.items() if not all_finite(tensor)]
    refuse_broken(Path(path), broken, dtype)
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval().requires_grad_(False)


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
        "modulation": ("scale_shift_table",),
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


def _stored_shape(parameter: str, shape: torch.Size, pieces: int, config: LatteConfig) -> tuple[int, ...]:
    """Returns the shape of each of the stored tensors that make up a parameter."""
    if parameter == "patch_embedding.weight":
        return (config.dim, config.in_channels, config.patch_size, config.patch_size)
    return (shape[0] // pieces, *shape[1:])


def _as_linear(parameter: str, stored: Tensor) -> Tensor:
    """Returns the patch convolution, (D, C, p, q), as a Linear over (p, q, C), and any other tensor as it is."""
    return stored.permute(0, 2, 3, 1).flatten(1) if parameter == "patch_embedding.weight" else stored
