"""Inference of a model's configuration from what its checkpoint declares and from the shapes of its tensors."""

from __future__ import annotations

import math
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

from causalrope_sp.config import DiTConfig
from causalrope_sp.errors import CheckpointError, ConfigError, printable
from causalrope_sp.weights.key_layout import Layout
from causalrope_sp.weights.tensor_files import Stored

WAN_HEAD_DIM = 128  # that of every published Wan; assumed where a checkpoint does not declare it
_LATENTS = ("out_channels", "out_dim")  # what declares the channels of latents; `in_channels` has control's too
LONGEST_TEXT = 1 << 16  # tokens; buffers of this length are allocated, so a declared length has a limit


def infer_config(
    tensors: dict[str, Stored], declared: dict[str, Any], layout: Layout, where: Path
) -> tuple[DiTConfig, tuple[str, ...]]:
    """Infers the configuration: fields that the checkpoint declares, the others from the shapes of its tensors.

    Args:
        tensors: the tensors of the model by the layout's names.
        declared: the content of its config.json or metadata; may be empty.
        layout: the key layout.
        where: the checkpoint, for messages.

    Returns:
        The configuration, and the names of its fields that are assumed: `num_heads` from Wan's head width, the others
        Wan's own values.

    Raises:
        CheckpointError: a tensor or field is missing that the configuration needs, or a declared value is impossible.
    """
    values = _shaped_fields(tensors, layout, where) | _declared_fields(declared, layout, where)
    assumed = tuple(f.name for f in fields(DiTConfig) if f.name not in values)
    if "num_heads" not in values:
        dim = values["dim"]
        if dim % WAN_HEAD_DIM:
            raise CheckpointError(
                f"{where}: does not say how many heads it has, and its width {dim} is no multiple of "
                f"{WAN_HEAD_DIM}; give `config`, or a config.json with num_heads beside it"
            )
        values["num_heads"] = dim // WAN_HEAD_DIM
    try:
        inferred = DiTConfig(**values)
    except ConfigError as error:
        raise CheckpointError(f"{where}: declares a model that cannot be built: {error}") from error
    if inferred.num_layers > len(tensors):
        raise CheckpointError(f"{where}: declares {inferred.num_layers} layers and holds {len(tensors)} tensors")
    if inferred.text_len > LONGEST_TEXT:
        raise CheckpointError(f"{where}: declares a text_len of {inferred.text_len}, above {LONGEST_TEXT}")
    return inferred, assumed


def _shaped_fields(tensors: dict[str, Stored], layout: Layout, where: Path) -> dict[str, Any]:
    """Returns the fields of `DiTConfig` that the shapes of tensors show."""
    outer_and_first = layout.names(1, image=True)

    def shape(parameter: str, rank: int) -> tuple[int, ...]:
        name = outer_and_first[parameter][0]
        if name not in tensors:
            raise CheckpointError(f"{where} ({layout.name} layout): 1 missing: {name}")
        found = tensors[name].shape
        if len(found) != rank:
            raise CheckpointError(f"{where} ({layout.name} layout): {name} is {found}, expected {rank} axes")
        return found

    dim, embedded, *patch = shape("patch_embedding.weight", 5)
    in_channels = shape("head.linear.weight", 2)[0] // max(1, math.prod(patch))
    return {
        "dim": dim,
        "in_channels": in_channels,
        "control_channels": max(0, embedded - in_channels),
        "patch_size": tuple(patch),
        "ffn_dim": shape("blocks.0.ffn.up.weight", 2)[0],
        "text_dim": shape("text_embedding.0.weight", 2)[1],
        "freq_dim": shape("time_embedding.0.weight", 2)[1],
        "num_layers": _count_layers(tensors),
        "image_dim": shape("image_embedding.1.weight", 2)[1] if _has_image(tensors, layout) else 0,
    }


def _has_image(tensors: dict[str, Stored], layout: Layout) -> bool:
    """Returns whether a checkpoint has any of the parameters that a model with image tokens alone has."""
    return any(name in tensors for names in layout.image_outer.values() for name in names)


def _declared_fields(declared: dict[str, Any], layout: Layout, where: Path) -> dict[str, Any]:
    """Returns the fields of `DiTConfig` that a checkpoint declares, translated from its layout's names."""
    values: dict[str, Any] = {}
    for name in (f.name for f in fields(DiTConfig)):
        word = next((w for w in (layout.config_names.get(name, name), name) if declared.get(w) is not None), None)
        if word is None:
            continue
        value = declared[word]
        several = name == "patch_size"
        numbers = value if several and isinstance(value, list) else [value]
        if isinstance(value, list) != several or not all(_is_number(number) for number in numbers):
            raise CheckpointError(
                f"{where}: declares {word} as {printable(repr(value))}, not "
                f"{'three numbers' if several else 'a number'}"
            )
        values[name] = tuple(value) if several else value
    latents = next((declared[word] for word in _LATENTS if _is_number(declared.get(word))), None)
    if latents is not None and "in_channels" in values and "control_channels" not in values:
        values["in_channels"], values["control_channels"] = latents, values["in_channels"] - latents
    head_dim = declared.get("attention_head_dim")
    if "dim" not in values and "num_heads" in values and isinstance(head_dim, int):
        values["dim"] = values["num_heads"] * head_dim
    return values


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _count_layers(tensors: dict[str, Stored]) -> int:
    """Returns the highest block number plus 1; a gap counts, so that its keys are reported as missing."""
    numbers = (match[1] for name in tensors if (match := re.match(r"blocks\.(\d{1,6})\.", name)))
    return 1 + max(int(number) for number in numbers)
