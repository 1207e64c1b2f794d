"""The CLIP vision encoder of Wan 2.1's image-to-video models: transformers' folder, or Wan's own file.

Wan's file is its XLMRobertaCLIP (wan/modules/clip.py), of which `visual` is read. It computes what transformers'
CLIPVisionModel computes; what differs is how a picture is brought to the encoder's size: diffusers scales its shorter
side and crops the middle, Wan scales both sides.
"""

from __future__ import annotations

from math import isqrt, prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from causalrope_sp.devices import on_meta
from causalrope_sp.errors import CheckpointError, first_line
from causalrope_sp.weights.messages import problem
from causalrope_sp.weights.tensor_files import WeightFiles

WAN_FILES = "models_clip_*.pth"  # as models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth
_HEAD_WIDTH = 80  # of ViT-H/14, which Wan's file does not say
_MEAN, _DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of wan/modules/clip.py
_VISUAL = "visual."
_OF_EMBEDDINGS = {
    "embeddings.class_embedding": "cls_embedding",
    "embeddings.patch_embedding.weight": "patch_embedding.weight",
    "embeddings.position_embedding.weight": "pos_embedding",
}
_OF_NORMS = {"pre_layrnorm": "pre_norm", "post_layernorm": "post_norm"}
_OF_LAYER = {
    "layer_norm1": "norm1",
    "layer_norm2": "norm2",
    "self_attn.out_proj": "attn.proj",
    "mlp.fc1": "mlp.0",
    "mlp.fc2": "mlp.2",
}


@torch.inference_mode()
def encode_picture(encoder: Path, picture: np.ndarray) -> Tensor:
    """Encodes a picture by a CLIP vision encoder, in float32 on the CPU.

    Args:
        encoder: the folder of transformers' encoder, beside that of its `image_processor`; or Wan's own file.
        picture: uint8 (H, W, 3).

    Returns:
        The output of the layer before the last one, (1, N, W), in float32.

    Raises:
        CheckpointError: the encoder cannot be read.
    """
    pixels, model = (_of_wan if encoder.is_file() else _of_transformers)(encoder, picture)
    tokens: Tensor = model.eval()(pixel_values=pixels, output_hidden_states=True).hidden_states[-2]
    return tokens


def encoder_bytes(encoder: Path) -> int:
    """Returns the bytes of an encoder's weights in memory, which is that of the CPU while an image is encoded.

    Args:
        encoder: as for `encode_picture`.

    Raises:
        CheckpointError: its files cannot be read.
    """
    stored = WeightFiles(encoder).tensors
    ours = [each for name, each in stored.items() if encoder.is_dir() or name.startswith(_VISUAL)]
    return torch.float32.itemsize * sum(prod(each.shape) for each in ours)


def _of_transformers(folder: Path, picture: np.ndarray) -> tuple[Tensor, Any]:
    """The picture as diffusers brings it to the encoder, and the encoder of a folder."""
    import transformers

    kind = getattr(transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor)
    try:
        processor = kind.from_pretrained(folder.parent / "image_processor")
        model = transformers.CLIPVisionModel.from_pretrained(folder, dtype=torch.float32)
    except (OSError, ValueError) as reason:  # transformers' errors are of these two kinds
        raise CheckpointError(f"cannot read the image encoder {folder}: {first_line(reason)}") from reason
    return processor(images=picture, return_tensors="pt")["pixel_values"], model


def _of_wan(file: Path, picture: np.ndarray) -> tuple[Tensor, Any]:
    """The picture as Wan brings it to the encoder, and the encoder of Wan's file."""
    model = _read_wan(file)
    pixels_13HW = torch.from_numpy(picture.copy()).permute(2, 0, 1).unsqueeze(0).float() / 255
    sides = (model.config.image_size,) * 2
    pixels_13HW = interpolate(pixels_13HW * 2 - 1, size=sides, mode="bicubic", align_corners=False) * 0.5 + 0.5
    mean, deviation = (torch.tensor(numbers).view(1, 3, 1, 1) for numbers in (_MEAN, _DEVIATION))
    return (pixels_13HW - mean) / deviation, model


def _read_wan(file: Path) -> Any:
    """transformers' encoder with the weights of Wan's file."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    files = WeightFiles(file)
    shapes = {name.removeprefix(_VISUAL): x.shape for name, x in files.tensors.items() if name.startswith(_VISUAL)}
    patch, positions, up = (
        shapes.get(name, ()) for name in ("patch_embedding.weight", "pos_embedding", "transformer.0.mlp.0.weight")
    )
    if len(patch) != 4 or len(positions) != 3 or len(up) != 2 or patch[0] % _HEAD_WIDTH or positions[1] < 2:
        raise CheckpointError(f"{file}: not Wan's CLIP encoder, a vision transformer with heads of {_HEAD_WIDTH}")
    with on_meta():
        model = CLIPVisionModel(
            CLIPVisionConfig(
                hidden_size=patch[0],
                intermediate_size=up[0],
                num_hidden_layers=len({name.split(".")[1] for name in shapes if name.startswith("transformer.")}),
                num_attention_heads=patch[0] // _HEAD_WIDTH,
                image_size=isqrt(positions[1] - 1) * patch[-1],
                patch_size=patch[-1],
                hidden_act="gelu",
                layer_norm_eps=1e-5,
            )
        )
    state, missing, misshapen = dict[str, Tensor](), set[str](), set[str]()
    for name, shaped in model.state_dict().items():
        own, third = _wan_name(name.removeprefix("vision_model."))
        if own not in shapes:
            missing.add(own)
        elif prod(shapes[own]) != shaped.numel() * (1 if third is None else 3):
            misshapen.add(f"{own} is {shapes[own]}")
        else:
            tensor = files.read(f"{_VISUAL}{own}").float()
            state[name] = (tensor if third is None else tensor.chunk(3)[third]).reshape(shaped.shape)
    if (wrong := problem(sorted(missing), [], sorted(misshapen))) is not None:
        raise CheckpointError(f"{file}: Wan's CLIP encoder: {wrong}")
    model.load_state_dict(state, assign=True)
    for name, buffer in list(model.named_buffers()):  # of positions, which no file has
        module, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(module), attribute, torch.arange(buffer.shape[-1]).unsqueeze(0))
    return model


def _wan_name(name: str) -> tuple[str, int | None]:
    """The name that a parameter of transformers' encoder has below `visual` in Wan's file, and which third of it."""
    if name in _OF_EMBEDDINGS:
        return _OF_EMBEDDINGS[name], None
    module, _, end = name.rpartition(".")
    if module in _OF_NORMS:
        return f"{_OF_NORMS[module]}.{end}", None
    _, _, layer, inner = module.split(".", 3)
    if inner in _OF_LAYER:
        return f"transformer.{layer}.{_OF_LAYER[inner]}.{end}", None
    return f"transformer.{layer}.attn.to_qkv.{end}", "qkv".index(inner.removeprefix("self_attn.")[0])
