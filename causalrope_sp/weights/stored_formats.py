"""Numbers of 8 bits that are dequantized as they are read, and tensors of a checkpoint that are no weights.

Weights are stored as e4m3, e5m2 or int8, either as they are (a plain cast to fp8) or beside a scale:

    X.weight with X.scale_weight    ComfyUI's scaled fp8, which marks its files by a tensor `scaled_fp8`
    X.weight with X.weight_scale    ComfyUI since 2025, compressed-tensors, LightX2V

A scale is one number, or one for each output. Scales of inputs are for products in 8 bits, and are not used.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from causalrope_sp.weights.tensor_files import Stored

NOMINAL = torch.bfloat16  # the dtype that dequantized numbers count as: their writers compute in 16 bits
_FP8 = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
_EIGHT_BITS = {**_FP8, "I8": torch.int8}
_SCALES = ("scale_weight", "weight_scale")
_HIDDEN = ("scale_input", "input_scale", "comfy_quant")  # beside a weight that is dequantized
_MARKER = "scaled_fp8"
_LONGEST_NOTE = 4096  # bytes
KNOWN_FORMATS = {"float8_e4m3fn", "float8_e5m2"}  # as ComfyUI names them
# Last words of names: a tokenizer's file, states of Transformer Engine, counters of averages and of norms, tables
_NO_WEIGHTS = (
    *("spiece_model", "tekken_model", "_extra_state", "num_batches_tracked", "num_updates", "decay", "n_averaged"),
    *("initted", "step", "global_step", "epoch", "position_ids", "freqs", "freqs_cis", "freqs_cos", "freqs_sin"),
)


@dataclass(frozen=True)
class Quantized:
    """How a tensor of 8 bits is stored.

    Attributes:
        dtype: the dtype of its numbers.
        scale: the name of the tensor that has its scale; None for a plain cast.
    """

    dtype: torch.dtype
    scale: str | None


def find_quantized(
    tensors: Mapping[str, Stored], read: Callable[[str], Tensor]
) -> tuple[dict[str, Quantized], set[str]]:
    """Finds the tensors that are dequantized, by the headers of a file.

    A tensor whose neighbours are of no known meaning is left alone, for `refuse_quantized` to name.

    Args:
        tensors: all tensors of the file.
        read: reads a tensor as it is stored.

    Returns:
        The quantized tensors by name, and the names of the scales and markers around them.
    """
    found: dict[str, Quantized] = {}
    hidden: set[str] = set()
    beside = _neighbours(tensors)
    for name, stored in tensors.items():
        dtype = _EIGHT_BITS.get(stored.dtype, stored.dtype) if isinstance(stored.dtype, str) else stored.dtype
        if isinstance(dtype, str) or dtype not in _EIGHT_BITS.values() or name == _MARKER or name in hidden:
            continue
        module, _, end = name.rpartition(".")
        others = beside.get(module, ()) if end == "weight" else ()
        scale = next((word for word in _SCALES if word in others), None)
        if any(word not in (*_SCALES, *_HIDDEN) for word in others) or not _is_known(f"{module}.", others, read):
            continue
        if scale is None:
            if dtype != torch.int8 and not others:
                found[name] = Quantized(dtype, None)
            continue
        if _fits(tensors[f"{module}.{scale}"], stored.shape):
            found[name] = Quantized(dtype, f"{module}.{scale}")
            hidden |= {f"{module}.{word}" for word in others}
    if _MARKER in tensors:
        hidden.add(_MARKER)
    return found, hidden


def dequantized(numbers: Tensor, scale: Tensor | None) -> Tensor:
    """Returns numbers times their scale, in float32.

    Args:
        numbers: (N, ...), of 8 bits, on the CPU.
        scale: one number or one for each of the N outputs; None for 1.
    """
    if numbers.dtype in _FP8.values():  # by a table, which takes a third of the time of torch's cast
        wide = torch.from_numpy(np.take(_values(numbers.dtype), numbers.view(torch.uint8).numpy()))
    else:
        wide = numbers.to(torch.float32)
    return wide if scale is None else wide.mul_(scale.to(torch.float32).reshape(-1, *(1 for _ in wide.shape[1:])))


@cache
def _values(dtype: torch.dtype) -> np.ndarray:
    """The float32 values of the 256 numbers of 8 bits."""
    return torch.arange(256, dtype=torch.uint8).view(dtype).float().numpy()


def is_no_weight(name: str) -> bool:
    """Returns whether a tensor is something else than a weight, by the last word of its name."""
    return name.rpartition(".")[2] in _NO_WEIGHTS


def _neighbours(tensors: Iterable[str]) -> dict[str, list[str]]:
    """module -> the last words of those of its tensors that say how others are quantized."""
    beside: dict[str, list[str]] = {}
    for name in tensors:
        module, _, end = name.rpartition(".")
        if ("scale" in end and end != "dora_scale") or "quant" in end or "zero" in end:
            beside.setdefault(module, []).append(end)
    return beside


def _is_known(start: str, others: Iterable[str], read: Callable[[str], Tensor]) -> bool:
    """Whether ComfyUI's note beside a weight, if there is one, names a format whose numbers need a scale alone."""
    if "comfy_quant" not in others:
        return True
    noted = read(f"{start}comfy_quant").flatten()
    if noted.dtype != torch.uint8 or len(noted) > _LONGEST_NOTE:
        return False
    try:
        note: Any = json.loads(bytes(noted.tolist()))
    except (ValueError, RecursionError):
        return False
    return isinstance(note, dict) and note.get("format") in KNOWN_FORMATS


def _fits(scale: Stored, shape: tuple[int, ...]) -> bool:
    """Whether a scale is one number or one for each output, of floating point."""
    size = 1
    for axis in scale.shape:
        size *= axis
    rows = len(shape) > 0 and len(scale.shape) > 0 and scale.shape[0] == size == shape[0]
    floating = isinstance(scale.dtype, torch.dtype) and scale.dtype.is_floating_point
    return floating and (size == 1 or rows)
