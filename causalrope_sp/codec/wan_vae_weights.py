"""The key layouts of the Wan VAE: that of diffusers' folder, and those of Wan's own `Wan2.1_VAE.pth` and
`Wan2.2_VAE.pth`.

All hold the same tensors in the same shapes under different names. Wan 2.1 numbers the layers of its encoder and
decoder in one sequence, diffusers groups the decoder's by stage, and Wan 2.2, whose stages have shortcuts, groups both.
Wan's files declare no configuration, so it is inferred from the shapes of the tensors.
"""

from __future__ import annotations

import math
from typing import Any

from causalrope_sp.codec.codec_tensors import read_exactly, shape_of
from causalrope_sp.codec.wan_vae_config import STATISTICS, WanVaeConfig
from causalrope_sp.codec.wan_vae_model import WanVae
from causalrope_sp.devices import on_meta
from causalrope_sp.errors import CheckpointError, ConfigError, first_line
from causalrope_sp.weights.tensor_files import WeightFiles

DIFFUSERS_MARKER = "decoder.mid_block.resnets.0.norm1.gamma"
WAN_MARKER = "decoder.middle.0.residual.0.gamma"
_GROUPED = "encoder.downsamples.0.downsamples.0.residual.0.gamma"  # Wan 2.2 alone groups the encoder's layers by stage

# diffusers' name of a module -> Wan's, within the VAE, within its encoder or decoder, within a residual block
_OUTER = {"quant_conv": "conv1", "post_quant_conv": "conv2"}
_SIDE = {
    "conv_in": "conv1",
    "mid_block.resnets.0": "middle.0",
    "mid_block.attentions.0": "middle.1",
    "mid_block.resnets.1": "middle.2",
    "norm_out": "head.0",
    "conv_out": "head.2",
}
_BLOCK = {
    "norm1": "residual.0",
    "conv1": "residual.2",
    "norm2": "residual.3",
    "conv2": "residual.6",
    "conv_shortcut": "shortcut",
}


def load_vae(files: WeightFiles) -> WanVae:
    """Loads the VAE of an open file of either layout.

    Args:
        files: the open file.

    Returns:
        The VAE in float32 on the CPU.

    Raises:
        CheckpointError: a tensor is missing, unexpected or of a wrong shape, or the configuration is missing or
            impossible.
    """
    vae = vae_on_meta(files)
    shapes = {name: tuple(tensor.shape) for name, tensor in vae.state_dict().items()}
    modules = {}
    if WAN_MARKER in files.tensors:
        modules = wan_modules(len(vae.config.dim_mult), vae.config.num_res_blocks, vae.config.is_residual)
    stored = {name: _stored_name(name, modules) for name in shapes}
    tensors = read_exactly(files, {stored[name]: shape for name, shape in shapes.items()})
    vae.load_state_dict({name: tensors[stored[name]] for name in shapes}, assign=True)
    return vae


def vae_on_meta(files: WeightFiles) -> WanVae:
    """Builds the VAE of an open file on the meta device, without weights.

    Its configuration is that of the config.json next to it in diffusers' layout, and inferred in Wan's.

    Args:
        files: the open file.

    Raises:
        CheckpointError: the configuration is missing or impossible.
    """
    if WAN_MARKER in files.tensors:
        return _on_meta(infer_config(files), files)
    config = files.declared_config()
    if not config:
        raise CheckpointError(f"{files.path}: a VAE under diffusers' names needs the config.json beside it")
    return _on_meta(config, files)


def wan_modules(stages: int, blocks: int, residual: bool) -> dict[str, str]:
    """Maps diffusers' name of every module to Wan's, where the two differ.

    Args:
        stages: stages of the encoder, and of the decoder.
        blocks: residual blocks in a stage of the encoder; a stage of the decoder has one more.
        residual: whether stages have shortcuts, as Wan 2.2's.
    """
    layers = _grouped_layers(stages, blocks) if residual else _numbered_layers(stages, blocks)
    modules = dict(_OUTER)
    for side, own in layers.items():
        for name, stored in {**_SIDE, **own}.items():
            modules[f"{side}.{name}"] = f"{side}.{stored}"
    blocks_of = [name for name in modules if "resnets" in name or "down_blocks" in name]
    for block in blocks_of:
        modules |= {f"{block}.{name}": f"{modules[block]}.{stored}" for name, stored in _BLOCK.items()}
    return modules


def _numbered_layers(stages: int, blocks: int) -> dict[str, dict[str, str]]:
    """The layers of encoder and decoder as Wan 2.1 numbers them."""
    encoder = {f"down_blocks.{n}": f"downsamples.{n}" for n in range(stages * (blocks + 1) - 1)}
    decoder = dict[str, str]()
    for stage in range(stages):
        start = stage * (blocks + 2)
        decoder |= {f"up_blocks.{stage}.resnets.{n}": f"upsamples.{start + n}" for n in range(blocks + 1)}
        decoder[f"up_blocks.{stage}.upsamplers.0"] = f"upsamples.{start + blocks + 1}"
    return {"encoder": encoder, "decoder": decoder}


def _grouped_layers(stages: int, blocks: int) -> dict[str, dict[str, str]]:
    """The layers of encoder and decoder as Wan 2.2 groups them."""
    layers = dict[str, dict[str, str]]()
    for side, way, count in (("encoder", "down", blocks), ("decoder", "up", blocks + 1)):
        own = layers[side] = dict[str, str]()
        for stage in range(stages):
            ours, theirs = f"{way}_blocks.{stage}", f"{way}samples.{stage}.{way}samples"
            own |= {f"{ours}.resnets.{n}": f"{theirs}.{n}" for n in range(count)}
            own[f"{ours}.{way}sampler"] = f"{theirs}.{count}"
    return layers


def infer_config(files: WeightFiles) -> dict[str, Any]:
    """Infers the configuration of a VAE in Wan's layout.

    Args:
        files: the open file.

    Returns:
        The fields of diffusers' config: the latents' mean and deviation as the file declares them, the others from the
        shapes of the tensors.

    Raises:
        CheckpointError: a tensor is missing that shows a field, or nothing declares the latents' mean and deviation.
    """
    base, pixels = shape_of(files, "encoder.conv1.weight", 5)[:2]
    channels = shape_of(files, "conv2.weight", 5)[0]
    widths, temporal, blocks = _stages(files)
    decoder_base = shape_of(files, "decoder.head.0.gamma", 4)[0] * base // widths[0]
    declared = files.declared_config()
    patch = math.isqrt(pixels // 3)
    inferred: dict[str, Any] = {
        "base_dim": base,
        "decoder_base_dim": None if decoder_base == base else decoder_base,
        "z_dim": channels,
        "dim_mult": [width // base for width in widths],
        "num_res_blocks": blocks,
        "temperal_downsample": temporal,
        "is_residual": _GROUPED in files.tensors,
        "in_channels": pixels,
        "out_channels": pixels,
        "patch_size": patch if patch > 1 else None,
        "scale_factor_temporal": 2 ** sum(temporal),
        "scale_factor_spatial": max(patch, 1) * 2 ** len(temporal),
    }
    statistics = {key: declared[key] for key in ("latents_mean", "latents_std") if key in declared}
    if len(statistics) < 2 and channels in STATISTICS:
        statistics = dict(zip(("latents_mean", "latents_std"), map(list, STATISTICS[channels]), strict=True))
    if len(statistics) < 2:
        raise CheckpointError(
            f"{files.path}: does not say latents_mean and latents_std of its {channels} channels; give a config.json "
            "beside it"
        )
    return inferred | statistics


def _stages(files: WeightFiles) -> tuple[list[int], list[bool], int]:
    """Returns the encoder's widths by stage, whether each but the last halves time, and a stage's residual blocks."""
    widths, temporal, blocks, layer = [0], list[bool](), [0], 0
    while True:
        name = f"encoder.downsamples.{layer}"
        if _GROUPED in files.tensors:
            name = f"encoder.downsamples.{len(temporal)}.downsamples.{layer}"
        if f"{name}.residual.6.weight" in files.tensors:
            widths[-1] = shape_of(files, f"{name}.residual.6.weight", 5)[0]
            blocks[-1] += 1
        elif f"{name}.resample.1.weight" in files.tensors:
            temporal.append(f"{name}.time_conv.weight" in files.tensors)
            widths.append(widths[-1])
            blocks.append(0)
            layer = -1 if _GROUPED in files.tensors else layer
        else:
            break
        layer += 1
    if 0 in blocks:
        raise CheckpointError(f"{files.path} (wan layout): 1 missing: {name}.residual.6.weight")
    return widths, temporal, blocks[0]


def _on_meta(config: dict[str, Any], files: WeightFiles) -> WanVae:
    """Builds the VAE on the meta device; a configuration that is refused raises CheckpointError."""
    try:
        sizes = WanVaeConfig.from_json(config)
        if len(sizes.dim_mult) * sizes.num_res_blocks >= len(files.tensors):
            raise ConfigError(
                f"num_res_blocks: {sizes.num_res_blocks} a stage, and the file has {len(files.tensors)} tensors"
            )
        with on_meta():
            return WanVae(sizes)
    except (ConfigError, RuntimeError, TypeError, OverflowError) as reason:  # a size that no tensor can have too
        raise CheckpointError(f"{files.path}: declares a VAE that cannot be built: {first_line(reason)}") from reason


def _stored_name(name: str, modules: dict[str, str]) -> str:
    """Returns a tensor's stored name: that of the longest module around it is replaced."""
    module = name
    while "." in module:
        module = module.rpartition(".")[0]
        if module in modules:
            return modules[module] + name[len(module) :]
    return name
