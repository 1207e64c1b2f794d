"""A UMT5 checkpoint of either key layout, checked and read into the parameters of transformers' encoder.

transformers' own loader is not used: it reads one of the two layouts, and some of its releases leave the token
embeddings of published Wan folders at zero (huggingface/transformers pull request 43880).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from causalrope_sp.devices import on_meta
from causalrope_sp.errors import CheckpointError, first_line
from causalrope_sp.text.umt5_keys import ATTENTION, BLOCK, FEED_FORWARD, LAYOUTS, TRANSFORMERS, T5Layout
from causalrope_sp.weights.finite import all_finite, refuse_broken
from causalrope_sp.weights.messages import problem, some
from causalrope_sp.weights.quantized_formats import refuse_quantized
from causalrope_sp.weights.tensor_files import WeightFiles

if TYPE_CHECKING:
    from transformers import UMT5EncoderModel

# The fields that config.json may declare. A size that no tensor's shape shows has the default of Wan's own code.
_DECLARED = (
    "vocab_size",
    "d_model",
    "d_kv",
    "d_ff",
    "num_layers",
    "num_heads",
    "relative_attention_num_buckets",
    "relative_attention_max_distance",
    "layer_norm_epsilon",
)
_GATE = "gated-gelu"
_MAX_DISTANCE, _EPS = 128, 1e-6


@dataclass(frozen=True)
class T5Checkpoint:
    """An encoder whose weights fit its model.

    Attributes:
        files: the open files.
        layout: the key layout.
        model: transformers' encoder on the meta device, which has shapes and no memory.
        names: parameter of the model -> stored name.
        dtype: the dtype of most of the numbers.
    """

    files: WeightFiles
    layout: T5Layout
    model: UMT5EncoderModel
    names: Mapping[str, str]
    dtype: torch.dtype

    @classmethod
    def open(cls, path: Path) -> T5Checkpoint:
        """Opens a checkpoint and checks its keys and shapes by its headers.

        Args:
            path: a file, the index of a sharded checkpoint, or a folder with one checkpoint in it.

        Returns:
            The open checkpoint.

        Raises:
            CheckpointError: it cannot be read, has no known layout, lacks a key, or has one too many or of a wrong
                shape.
        """
        files = WeightFiles(path).of_network("text encoder")
        refuse_quantized(files)
        layout, prefix = _detect(files)
        sizes = _sizes(files, layout, prefix)
        model = _build(sizes, path)
        shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        names, missing, misshapen, seen = dict[str, str](), list[str](), list[str](), set[str]()
        for parameter, choices in layout.names(sizes["num_layers"]).items():
            stored = [prefix + choice for choice in choices if prefix + choice in files.tensors]
            if not stored:
                missing.append(prefix + choices[0])
                continue
            names[parameter] = stored[0]
            seen.update(stored)
            expected = shapes[parameter]
            misshapen += [
                f"{name} is {files.tensors[name].shape}, expected {expected}"
                for name in stored
                if files.tensors[name].shape != expected
            ]
        rest = tuple(prefix + name for name in layout.unneeded)
        unexpected = sorted(name for name in files.tensors.keys() - seen if not rest or not name.startswith(rest))
        wrong = problem(missing, unexpected, misshapen)
        if wrong:
            raise CheckpointError(f"{path} ({layout.name} layout of UMT5): {wrong}")
        return cls(files, layout, model, names, files.numbers(names.values()).most_common(1)[0][0])

    def dtype_of(self, parameter: str, dtype: torch.dtype) -> torch.dtype:
        """Returns the dtype of a parameter in an encoder that computes in `dtype`: float32 for those that transformers
        keeps wide in float16, whose range their outputs leave."""
        wide = self.model._keep_in_fp32_modules or ()
        return torch.float32 if dtype == torch.float16 and not set(wide).isdisjoint(parameter.split(".")) else dtype

    def read(self, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        """Reads all parameters.

        They are copied, because a stored tensor is a view of its file, which may change later.

        Args:
            dtype: the dtype that they are cast to, see `dtype_of`.
            device: the device that they are copied to.

        Returns:
            The parameters by their names in the model.

        Raises:
            CheckpointError: a parameter cannot be read, or holds NaN or infinity.
        """
        state, broken = {}, []
        for parameter, name in self.names.items():
            stored = self.files.read(name)
            kind = self.dtype_of(parameter, dtype)
            state[parameter] = torch.empty(stored.shape, dtype=kind, device=device).copy_(stored)
            if not all_finite(state[parameter]):
                broken.append(name)
        refuse_broken(self.files.path, broken, dtype)
        return state


def _detect(files: WeightFiles) -> tuple[T5Layout, str]:
    """Finds the key layout and the prefix before its names."""
    for layout in LAYOUTS:
        prefix = layout.prefix_in(files.tensors)
        if prefix is not None:
            return layout, prefix
    known = " or ".join(f"{layout.name} ({layout.blocks}.0.{layout.marker}...)" for layout in LAYOUTS)
    found = some(list(files.tensors)) or "none"
    raise CheckpointError(f"{files.path}: not a UMT5 encoder: none of its keys ({found}) is of the layout {known}")


def _sizes(files: WeightFiles, layout: T5Layout, prefix: str) -> dict[str, Any]:
    """Returns the fields of `UMT5Config`: those that config.json declares, the others from the shapes of the tensors.

    config.json counts only in transformers' layout: next to a .pth it is that of Wan's DiT.
    """
    every = layout.names(1)

    def shape(parameter: str) -> tuple[int, int]:
        choices = [prefix + choice for choice in every[parameter]]
        name = next((choice for choice in choices if choice in files.tensors), None)
        if name is None:
            raise CheckpointError(f"{files.path} ({layout.name} layout of UMT5): 1 missing: {choices[0]}")
        found = files.tensors[name].shape
        if len(found) != 2 or 0 in found:
            raise CheckpointError(f"{files.path} ({layout.name} layout of UMT5): {name} is {found}, expected 2 axes")
        return found[0], found[1]

    vocab, width = shape("shared.weight")
    buckets, heads = shape(f"{BLOCK}.0.{ATTENTION}.relative_attention_bias.weight")
    sizes: dict[str, Any] = {
        "vocab_size": vocab,
        "d_model": width,
        "d_kv": shape(f"{BLOCK}.0.{ATTENTION}.q.weight")[0] // heads,
        "d_ff": shape(f"{BLOCK}.0.{FEED_FORWARD}.wi_0.weight")[0],
        "num_layers": layout.count_blocks(files.tensors, prefix),
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
        "relative_attention_max_distance": _MAX_DISTANCE,
        "layer_norm_epsilon": _EPS,
    }
    if layout is TRANSFORMERS:
        sizes |= _declared(files)
    buckets, furthest = sizes["relative_attention_num_buckets"], sizes["relative_attention_max_distance"]
    if buckets < 4 or furthest <= buckets // 4:  # half the buckets look each way, and half of those are logarithmic
        raise CheckpointError(
            f"{files.path}: declares {buckets} buckets of distances up to {furthest}; expected at least 4 buckets, and "
            "distances beyond a quarter of them"
        )
    if sizes["num_layers"] > len(files.tensors):
        raise CheckpointError(
            f"{files.path}: declares {sizes['num_layers']} layers and holds {len(files.tensors)} tensors"
        )
    return sizes


def _declared(files: WeightFiles) -> dict[str, Any]:
    """Returns the fields of `UMT5Config` that config.json declares, each checked."""
    declared = files.declared_config()
    gate = declared.get("feed_forward_proj", _GATE)
    if gate != _GATE:
        raise CheckpointError(f"{files.path}: declares feed_forward_proj as {gate!r}; UMT5 has {_GATE}")
    values = {}
    for word in _DECLARED:
        value = declared.get(word)
        if value is None:
            continue
        whole = isinstance(value, int) or (isinstance(value, float) and word == "layer_norm_epsilon")
        if not whole or isinstance(value, bool) or value <= 0:
            raise CheckpointError(f"{files.path}: declares {word} as {value!r}, not as a number above 0")
        values[word] = value
    return values


def _build(sizes: Mapping[str, Any], path: Path) -> UMT5EncoderModel:
    """Builds the encoder on the meta device; sizes that are refused raise CheckpointError."""
    from transformers import UMT5Config, UMT5EncoderModel

    # "eager" adds and rounds in the order of Wan's own code in every release of transformers
    try:
        config = UMT5Config(**sizes, feed_forward_proj=_GATE, dropout_rate=0.0, attn_implementation="eager")
        with on_meta():
            model = UMT5EncoderModel(config)
    except Exception as error:  # transformers raises whatever its code meets
        raise CheckpointError(f"{path}: declares an encoder that cannot be built: {first_line(error)}") from error
    return model.eval().requires_grad_(False)
