"""Names the formats of quantized checkpoints that are not read, by what their writers leave in them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from causalrope_sp.errors import CheckpointError, printable
from causalrope_sp.io.json_files import parse_object
from causalrope_sp.weights.stored_formats import KNOWN_FORMATS

if TYPE_CHECKING:
    from causalrope_sp.weights.tensor_files import WeightFiles

# The endings of tensor names, of which every format has at least one of its own.
_SUFFIXES = {
    "_weight_qdata": "torchao",
    ".weight._data": "optimum-quanto",
    ".weight.absmax": "bitsandbytes (4 bits)",
    ".SCB": "bitsandbytes (8 bits)",
    ".wscales": "nunchaku (SVDQuant)",
    ".qzeros": "GPTQ or AWQ",
    ".comfy_quant": "ComfyUI",
    ".scale_weight": "ComfyUI, in another form than fp8 with one scale for a tensor or an output",
    ".weight_scale": "ComfyUI or others, in another form than 8 bits with one scale for a tensor or an output",
    ".weight_scale_inv": "fp8 in blocks",
}
_METADATA = {"quantization_config": "nunchaku (SVDQuant)"}
_MODULES = {"torchao": "torchao", "optimum": "optimum-quanto", "bitsandbytes": "bitsandbytes"}
_ADVICE = "a format that is not read; save the model before it is quantized, and load it with weights='fp8' for 8 bits"


def refuse_quantized(files: WeightFiles) -> None:
    """Refuses a checkpoint that another library has quantized in a format that is not read (see `stored_formats`).

    A config.json's `quantization_config` counts only if a tensor is not one of floating point of 16 bits or more.

    Args:
        files: the open checkpoint.

    Raises:
        CheckpointError: it is quantized; the message names the format and what shows it.
    """
    shown = _by_names(files.tensors) or _by_metadata(files.metadata)
    if shown is None and any(not _is_plain(stored.dtype) for stored in files.tensors.values()):
        shown = _by_config(files.declared_config())
    if shown is not None:
        raise CheckpointError(f"{files.path}: quantized by {shown}, {_ADVICE}")


def quantized_class(name: str) -> str | None:
    """Returns what a class of a quantizing library shows, as a sentence's end; None for any other class.

    Args:
        name: the class with its module, such as torchao.quantization.Int8Tensor.
    """
    writer = _MODULES.get(name.split(".")[0])
    return None if writer is None else f"quantized by {writer} (it holds {printable(name)}), {_ADVICE}"


def _by_names(names: Iterable[str]) -> str | None:
    for name in names:
        for suffix, writer in _SUFFIXES.items():
            if name.endswith(suffix):
                return f"{writer} (it has {printable(name)})"
    return None


def _by_metadata(metadata: Mapping[str, str]) -> str | None:
    noted = metadata.get("_quantization_metadata")
    if noted is not None:
        try:
            layers: Any = parse_object(noted).get("layers")
        except ValueError:
            layers = None
        known = isinstance(layers, dict) and all(isinstance(layer, dict) for layer in layers.values())
        formats = {str(layer.get("format")) for layer in layers.values()} if known else {"an unknown form"}
        if other := sorted(formats - KNOWN_FORMATS):
            return f"ComfyUI as {printable(other[0])} (its metadata has _quantization_metadata)"
    return next((f"{writer} (its metadata has {key})" for key, writer in _METADATA.items() if key in metadata), None)


def _by_config(declared: Mapping[str, Any]) -> str | None:
    config = declared.get("quantization_config")
    if not isinstance(config, dict):
        return None
    return f"{printable(config.get('quant_method') or 'an unnamed method')} (config.json has quantization_config)"


def _is_plain(dtype: torch.dtype | str) -> bool:
    return isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize > 1
