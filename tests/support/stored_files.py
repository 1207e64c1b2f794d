"""Checkpoints of 8 bits and fewer, as ComfyUI and the `gguf` package write them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

Type = gguf.GGMLQuantizationType
# Where a block of a type has its float16 scales: bytes from the start; the package quantizes to none of these
SCALES = {Type.Q4_K: (0, 4), Type.Q5_K: (0, 4), Type.Q6_K: (208, 210)}


def quantized(weight: Tensor, kind: Any) -> np.ndarray:
    """The bytes of a matrix in a type; of those that the package does not write, random bytes with scales near 0.01."""
    numbers = weight.float().numpy()
    if kind not in SCALES:
        return gguf.quants.quantize(numbers, kind)
    shape = gguf.quant_shape_to_byte_shape(numbers.shape, kind)
    size = gguf.GGML_QUANT_SIZES[kind][1]
    made = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8).reshape(-1, size)
    start, stop = SCALES[kind]
    made[:, start:stop] = np.full((len(made), (stop - start) // 2), 0.01, np.float16).view(np.uint8)
    return made.reshape(shape)


def write_gguf(
    file: Path, state: Mapping[str, Tensor], kind: Any, flat: str = "patch_embedding.weight"
) -> dict[str, Tensor]:
    """Writes Wan's tensors as city96's converter does: matrices of blocks in `kind`, the rest in float32, and the
    convolution of five axes with fewer and its shape in the metadata.

    Returns:
        The tensors as the package dequantizes them.
    """
    writer, exact = gguf.GGUFWriter(file, "wan"), dict[str, Tensor]()
    for name, tensor in state.items():
        if tensor.ndim == 2 and name.startswith(("blocks", "encoder", "enc.")) and name.endswith("weight"):
            stored = quantized(tensor, kind)
            exact[name] = torch.from_numpy(gguf.quants.dequantize(stored, kind)).reshape(tensor.shape)
            writer.add_tensor(name, stored, raw_dtype=kind)
            continue
        exact[name] = tensor.float()
        if name == flat:
            writer.add_array(f"comfy.gguf.orig_shape.{name}", list(tensor.shape))
            tensor = tensor.flatten(2)
        writer.add_tensor(name, tensor.float().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return exact


def save_scaled_fp8(
    file: Path,
    state: Mapping[str, Tensor],
    metadata: dict[str, str] | None = None,
    end: str = "scale_weight",
    by_row: bool = False,
) -> dict[str, Tensor]:
    """Writes matrices of blocks as e4m3 with a scale for each, or for each output, and the rest as it is.

    Returns:
        The tensors as they dequantize, in float32.
    """
    stored, exact = {"scaled_fp8": torch.zeros(2).to(torch.float8_e4m3fn)}, dict[str, Tensor]()
    for name, tensor in state.items():
        stored[name], exact[name] = tensor, tensor.float()
        if tensor.ndim == 2 and "block" in name and name.endswith(".weight"):
            wide = tensor.float()
            scale = (wide.abs().amax(1, keepdim=True) if by_row else wide.abs().amax().reshape(())) / 448
            numbers = (wide / scale).to(torch.float8_e4m3fn)
            module = name.removesuffix(".weight")
            stored |= {name: numbers, f"{module}.{end}": scale, f"{module}.scale_input": torch.ones(())}
            exact[name] = numbers.float() * scale
    save_file(stored, file, metadata)
    return exact
