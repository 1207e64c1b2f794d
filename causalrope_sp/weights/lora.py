"""LoRA files (arXiv 2106.09685), merged into the weights as these are loaded: W + weight · alpha / r · up @ down.

Three sets of names are read, each over either key layout: those of PEFT
(`base_model.model.blocks.0.self_attn.q.lora_A.default.weight`), of diffusers
(`transformer.blocks.0.attn1.to_q.lora_A.weight`) and of kohya's trainers
(`lora_unet_blocks_0_self_attn_q.lora_down.weight`, `.alpha`). Projections that the model fuses may be adapted one by
one or as one (`to_qkv`).

Shapes: r the LoRA's rank; `down` is (r, in, ...), `up` is (out, r, ...).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from causalrope_sp.errors import CheckpointError, ConfigError, printable
from causalrope_sp.models.causal_dit import CausalDiT
from causalrope_sp.weights.diffusers_keys import DIFFUSERS
from causalrope_sp.weights.finite import all_finite
from causalrope_sp.weights.key_layout import Shape, arrange, stored_shape
from causalrope_sp.weights.messages import some
from causalrope_sp.weights.tensor_files import DTYPES, WeightFiles, json_object
from causalrope_sp.weights.wan_keys import WAN
from causalrope_sp.weights.wrappings import LORA_PARTS, bare_names

PREFIXES = ("base_model", "diffusion_model", "generator", "model", "net", "transformer")
KOHYA = "lora_unet_"
FUSED = {"self_attn.qkv": ("self_attn.to_qkv", "attn1.to_qkv"), "cross_attn.kv": ("attn2.to_kv",)}
_KEY = re.compile(
    r"(?P<module>.+?)\.(?:"
    r"(?P<down>lora_A|lora_down|lora\.down)(?:\.\w+)?\.weight|"
    r"(?P<up>lora_B|lora_up|lora\.up)(?:\.\w+)?\.weight|"
    r"(?P<up_bias>lora_B|lora_up)(?:\.\w+)?\.bias|"
    r"(?P<alpha>alpha)|(?P<diff>diff)|(?P<diff_b>diff_b))"
)


@dataclass(frozen=True)
class Lora:
    """A LoRA to merge, and how strongly.

    Attributes:
        path: its file or folder.
        weight: the factor of its change; 1 merges it as trained.
        alpha: replaces the alpha that the file declares; a file that declares none has alpha = r.

    Raises:
        ConfigError: `weight` or `alpha` is not a finite number.
    """

    path: str | PathLike[str]
    weight: float = 1.0
    alpha: float | None = None

    def __post_init__(self) -> None:
        for name, value in (("weight", self.weight), ("alpha", 0.0 if self.alpha is None else self.alpha)):
            if not isinstance(value, int | float) or not math.isfinite(value):
                raise ConfigError(f"the {name} of a LoRA must be a finite number, not {value!r}")


@dataclass(frozen=True)
class _Target:
    """A stored tensor that makes up piece `number` of a parameter; all pieces, concatenated, if `number` is None."""

    parameter: str
    number: int | None
    shape: Shape


@dataclass
class _Change:
    """What a file holds for one module: role -> the name of the tensor that has it."""

    module: str
    keys: dict[str, str] = field(default_factory=dict)


class LoraMerge:
    """An open LoRA, matched to the parameters of a model.

    Args:
        lora: the file, its weight and its alpha.
        model: the model to match; it may be on the meta device.

    Raises:
        CheckpointError: the file cannot be read, is of an unknown kind, or has keys that fit no parameter.
    """

    def __init__(self, lora: Lora, model: CausalDiT) -> None:
        self.lora, self.path = lora, Path(lora.path)
        self.files = WeightFiles(self.path, parts=LORA_PARTS)
        self.declared = self._declared()
        self.changes: dict[str, list[tuple[_Target, _Change]]] = {}
        targets = dict(_targets(model))
        unknown: list[str] = []
        for change in self._read_keys(unknown).values():
            unknown += self._assign(change, targets)
        if unknown:
            raise CheckpointError(
                f"{self.path}: {len(unknown)} keys of the LoRA fit no parameter of the model: {some(sorted(unknown))}"
            )
        if not self.changes:
            raise CheckpointError(f"{self.path}: holds no LoRA ({some(self.files.tensors) or 'no tensors at all'})")

    def into(self, stored: Tensor, parameter: str, number: int, device: torch.device) -> Tensor:
        """Merges this LoRA into one piece of a parameter.

        Args:
            stored: the piece, in the model's shape.
            parameter: the parameter's name in the model.
            number: which of the parameter's pieces it is, counted from 0.
            device: the device that computes.

        Returns:
            The sum on `device` in float32 or wider; `stored` itself if the LoRA does not change it.

        Raises:
            CheckpointError: the LoRA's change holds NaN or infinity, or cannot be read.
        """
        for target, change in self.changes.get(parameter, ()):
            if target.number not in (None, number):
                continue
            wide = torch.promote_types(stored.dtype, torch.float32)
            delta = self._delta(target, change, wide, device)
            if not all_finite(delta):
                raise CheckpointError(f"{self.path}: NaN or infinite for {parameter}: {some(change.keys.values())}")
            if target.number is None:
                delta = delta[number * len(stored) : (number + 1) * len(stored)]
            stored = stored.to(device, wide) + delta
        return stored

    def _delta(self, target: _Target, change: _Change, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Returns what is added to the parameter, in the model's shape."""

        def read(role: str) -> Tensor:
            return self.files.read(change.keys[role]).to(device, dtype)

        bias = target.parameter.endswith(".bias")
        if "diff_b" in change.keys and bias:
            return self.lora.weight * read("diff_b")
        if "up_bias" in change.keys and bias:
            return self._scale(change) * read("up_bias")
        if "diff" in change.keys:
            return self.lora.weight * arrange(target.parameter, read("diff"))
        delta = self._scale(change) * (read("up").flatten(1) @ read("down").flatten(1))
        return arrange(target.parameter, delta.unflatten(1, target.shape[1:]))

    def _scale(self, change: _Change) -> float:
        """Returns the factor of up @ down: weight · alpha / r, or with rsLoRA weight · alpha / √r."""
        rank = self.files.tensors[change.keys["down"]].shape[0]
        alpha = self.lora.alpha
        if alpha is None and "alpha" in change.keys:
            alpha = float(self.files.read(change.keys["alpha"]))
        if alpha is None:
            patterns = self.declared.get("alpha_pattern") or {}
            matching = (a for name, a in patterns.items() if change.module.endswith(name))
            alpha = next(matching, self.declared.get("lora_alpha", rank))
        if not isinstance(alpha, int | float) or not math.isfinite(alpha):
            raise CheckpointError(f"{self.path}: declares alpha of {printable(change.module)} as {printable(alpha)}")
        return self.lora.weight * alpha / (math.sqrt(rank) if self.declared.get("use_rslora") else rank)

    def _declared(self) -> dict[str, Any]:
        """Returns PEFT's configuration of the adapter, from its folder or from the file's metadata."""
        declared: dict[str, Any] = {}
        if self.path.is_dir() or self.path.name.startswith("adapter_model"):
            declared = self.files.declared_config("adapter_config.json")
        if "lora_adapter_metadata" in self.files.metadata:
            found = json_object(self.files.metadata["lora_adapter_metadata"], f"{self.path}: metadata of the adapter")
            declared = {key.removeprefix("transformer."): value for key, value in found.items()}
        if declared.get("use_dora"):
            raise CheckpointError(f"{self.path}: a DoRA, which is not merged here; only LoRA is")
        if not isinstance(declared.get("alpha_pattern") or {}, dict):
            raise CheckpointError(f"{self.path}: declares an alpha_pattern that is no JSON object")
        return declared

    def _read_keys(self, unknown: list[str]) -> dict[str, _Change]:
        """Groups the file's keys by module; adds those of no known form to `unknown`."""
        changes: dict[str, _Change] = {}
        for bare, name in bare_names(self.files.tensors, self.path).items():
            match = _KEY.fullmatch(bare)
            if match is None:
                unknown.append(name)
                continue
            role = next(role for role, found in match.groupdict().items() if found and role != "module")
            change = changes.setdefault(match["module"], _Change(match["module"]))
            if role in change.keys:
                raise CheckpointError(
                    f"{self.path}: {printable(change.keys[role])} and {printable(name)} are the same twice"
                )
            change.keys[role] = name
        return changes

    def _assign(self, change: _Change, targets: Mapping[str, _Target]) -> list[str]:
        """Adds a change to the parameters that it changes; returns its keys if there are none."""
        module = _plain_name(change.module)
        weight, bias = targets.get(f"{module}.weight", targets.get(module)), targets.get(f"{module}.bias")
        roles = {"down", "up", "diff"} & change.keys.keys()
        biases = change.keys.keys() & {"up_bias", "diff_b"}
        if (weight is None and (roles or not biases)) or (bias is None and biases):
            return list(change.keys.values())
        pair = {"down", "up"} & roles
        lone_bias = "up_bias" in biases and len(pair) < 2  # its scale is that of the pair
        if len(pair) == 1 or lone_bias or (not roles and "diff_b" not in change.keys):
            raise CheckpointError(
                f"{self.path}: {printable(change.module)} has only {some(change.keys)} of down and up"
            )
        for target, present in ((weight, roles), (bias, biases)):
            if target is not None and present:
                self._check_shapes(target, change)
                self.changes.setdefault(target.parameter, []).append((target, change))
        return []

    def _check_shapes(self, target: _Target, change: _Change) -> None:
        """Raises CheckpointError if a tensor of a change has a shape or dtype that does not fit its target."""
        shapes = {role: self.files.tensors[key].shape for role, key in change.keys.items()}
        rank = shapes["down"][0] if shapes.get("down") else 0
        rows, columns = target.shape[0], prod(target.shape[1:])
        fits = {
            "down": lambda s: len(s) > 1 and s[0] > 0 and prod(s[1:]) == columns,
            "up": lambda s: len(s) > 1 and s[:2] == (rows, rank) and prod(s[2:]) == 1,
            "diff": lambda s: s == target.shape,
            "up_bias": lambda s: s == (rows,),
            "diff_b": lambda s: s == (rows,),
            "alpha": lambda s: prod(s) == 1,
        }
        for role, key in change.keys.items():
            if role in ("down", "up", "diff") and target.parameter.endswith(".bias"):
                continue
            if not fits[role](shapes[role]):
                raise CheckpointError(
                    f"{self.path}: {printable(key)} is {shapes[role]}, which does not fit {target.shape} at rank {rank}"
                )
            if role != "alpha" and self.files.tensors[key].dtype not in DTYPES.values():
                raise CheckpointError(f"{self.path}: {printable(key)} is stored as {self.files.tensors[key].dtype}")


def _targets(model: CausalDiT) -> Iterator[tuple[str, _Target]]:
    """Yields every name that a LoRA may use, of either layout, with dots and in kohya's form with underscores."""
    for parameter, shaped in model.named_parameters():
        for layout in (WAN, DIFFUSERS):
            stored = layout.names(model.config.num_layers)[parameter]
            shape = stored_shape(parameter, tuple(shaped.shape), len(stored), model.config)
            for number, name in enumerate(stored):
                yield from _spelled(name, _Target(parameter, number, shape))
        module, _, end = parameter.rpartition(".")
        fused = next((whole for whole in FUSED if module.endswith(whole)), None)
        if fused is not None:
            for alias in (fused, *FUSED[fused]):
                name = f"{module.removesuffix(fused)}{alias}.{end}"
                yield from _spelled(name, _Target(parameter, None, tuple(shaped.shape)))


def _spelled(name: str, target: _Target) -> Iterator[tuple[str, _Target]]:
    """Yields a stored name as it is and in kohya's form."""
    yield name, target
    module, dot, end = name.rpartition(".")
    if end in ("weight", "bias"):
        yield KOHYA + module.replace(".", "_") + dot + end, target


def _plain_name(module: str) -> str:
    """Returns a module's name without the prefixes that trainers add."""
    words = module.split(".")
    while len(words) > 1 and words[0] in PREFIXES:
        words = words[1:]
    return ".".join(words)
