"""LoRA files and their relatives, merged into the weights as these are loaded: W + weight · alpha / r · up @ down.

`adapter_names` lists the names that are read, each over either key layout, and `adapter_math` the arithmetic of LoHa,
LoKr and DoRA. Projections that the model fuses may be adapted one by one or as one (`to_qkv`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from os import PathLike, fspath
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from causalrope_sp.checks import check_choice, shown
from causalrope_sp.errors import CheckpointError, ConfigError, printable
from causalrope_sp.models.causal_dit import CausalDiT
from causalrope_sp.weights.adapter_file import AdapterFile, AdapterReport, Change
from causalrope_sp.weights.adapter_math import factors_of, product, with_magnitudes
from causalrope_sp.weights.adapter_names import flat
from causalrope_sp.weights.diffusers_keys import DIFFUSERS
from causalrope_sp.weights.finite import all_finite
from causalrope_sp.weights.key_layout import Shape, arrange, stored_shape
from causalrope_sp.weights.messages import some
from causalrope_sp.weights.tensor_files import DTYPES
from causalrope_sp.weights.wan_keys import WAN

FUSED = {"self_attn.qkv": ("self_attn.to_qkv", "attn1.to_qkv"), "cross_attn.kv": ("attn2.to_kv",)}
_BIASES = ("up_bias", "diff_b")
# modules that only models with image tokens have, in the spelling of `flat`
_OF_IMAGE = re.compile(r"(?:^|_)(?:(?:norm_)?[kv]_img|img_emb_.+|add_[kv]_proj|norm_added_k|image_embedder_.+)$")
_NO_IMAGE = "no-image"
_STRONGEST = torch.finfo(torch.float32).max  # the largest weight or alpha
Expert = Literal["high-noise", "low-noise"]
EXPERTS: tuple[Expert, ...] = get_args(Expert)


@dataclass(frozen=True)
class Lora:
    """A LoRA, DoRA, LoHa or LoKr to merge, and how strongly.

    Attributes:
        path: its file or folder.
        weight: the factor of its change of the weights; 1 merges it as trained.
        alpha: replaces the alpha that the file declares; a file that declares none has alpha = r.
        leave_out_image: of an image-to-video LoRA, merges all but what a model without an image has not: the modules of
            image tokens, and a patch embedding of more channels. Without, such a file is refused by such a model.
        expert: which of two transformers it is of, "high-noise" or "low-noise"; None if its name says so, or for a
            model of one transformer.

    Raises:
        ConfigError: `path` is none, `weight` or `alpha` is not a finite number that float32 has, or there is no such
            expert.
    """

    path: str | PathLike[str]
    weight: float = 1.0
    alpha: float | None = None
    leave_out_image: bool = False
    expert: Expert | None = None

    def __post_init__(self) -> None:
        if self.expert is not None:
            check_choice("the expert of a LoRA", self.expert, EXPERTS)
        if not isinstance(self.path, str | PathLike) or not fspath(self.path):
            raise ConfigError(f"the path of a LoRA must be that of its file or folder, not {shown(self.path)}")
        for name, value in (("weight", self.weight), ("alpha", 0.0 if self.alpha is None else self.alpha)):
            if not isinstance(value, int | float) or not math.isfinite(value) or abs(value) > _STRONGEST:
                raise ConfigError(f"the {name} of a LoRA must be a finite number that float32 has, not {value!r}")

    @classmethod
    def of(cls, text: str | PathLike[str] | Lora) -> Lora:
        """Returns a LoRA as it is, or makes one from FILE or FILE:WEIGHT, with :no-image behind either for
        `leave_out_image`, and :high-noise or :low-noise for `expert`; a file of the whole name comes first.

        Raises:
            ConfigError: the weight is not a finite number.
        """
        if isinstance(text, Lora):
            return text
        if not isinstance(text, str | PathLike) or not fspath(text):
            return cls(text)
        path, colon, weight = str(text).rpartition(":")
        if path and not Path(text).exists():
            if weight == _NO_IMAGE:
                return replace(cls.of(path), leave_out_image=True)
            if (expert := next((name for name in EXPERTS if name == weight), None)) is not None:
                return replace(cls.of(path), expert=expert)
        try:
            named = not colon or not path or Path(text).exists()
            return cls(text) if named else cls(path, float(weight))
        except ValueError:
            raise ConfigError(
                f"a LoRA is FILE or FILE:WEIGHT with a finite number, and there is no file {printable(text)}"
            ) from None

    def __str__(self) -> str:
        more = [f"weight {self.weight:g}"]
        more += [] if self.alpha is None else [f"alpha {self.alpha:g}"]
        more += ["no image"] if self.leave_out_image else []
        more += [] if self.expert is None else [self.expert]
        return f"{printable(Path(self.path).name)} ({', '.join(more)})"


@dataclass(frozen=True)
class _Target:
    """A stored tensor that makes up piece `number` of a parameter; all pieces, concatenated, if `number` is None."""

    parameter: str
    number: int | None
    shape: Shape


class LoraMerge:
    """An open LoRA, matched to the parameters of a model.

    Args:
        lora: the file, its weight and its alpha.
        model: the model to match; it may be on the meta device.

    Attributes:
        files: the open files.

    Raises:
        CheckpointError: the file cannot be read, is of an unknown kind, or has keys that fit no parameter.
    """

    def __init__(self, lora: Lora, model: CausalDiT) -> None:
        self.lora, self.path = lora, Path(lora.path)
        self._adapter = AdapterFile(self.path, lora.alpha)
        self.files = self._adapter.files
        self.changes: dict[str, list[tuple[_Target, Change]]] = {}
        targets, unknown = dict(_targets(model)), list(self._adapter.unknown)
        of_image = list[str]()
        for change in self._adapter.changes.values():
            if self._is_of_image(change, targets, model):
                of_image += change.keys.values()
            else:
                unknown += self._assign(change, targets)
        if of_image and not lora.leave_out_image:
            raise CheckpointError(
                f"{self.path}: an image-to-video LoRA: {len(of_image)} of its keys are of layers that read an image, "
                f"which the model has not ({some(sorted(of_image))}); FILE:{_NO_IMAGE} merges the others"
            )
        if unknown:
            raise CheckpointError(
                f"{self.path}: {len(unknown)} keys of the LoRA fit no parameter of the model: {some(sorted(unknown))}"
            )
        if not self.changes:
            raise CheckpointError(f"{self.path}: holds no LoRA ({some(self.files.tensors) or 'no tensors at all'})")

    def report(self) -> AdapterReport:
        """Describes the file: its kinds, ranks and scales."""
        return self._adapter.report()

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
            stored = stored.to(device, torch.promote_types(stored.dtype, torch.float32))
            delta = self._delta(target, change, stored, number)
            if not all_finite(delta):
                raise CheckpointError(f"{self.path}: NaN or infinite for {parameter}: {some(change.keys.values())}")
            stored = torch.add(stored, delta, alpha=self.lora.weight)
        return stored

    def _delta(self, target: _Target, change: Change, stored: Tensor, number: int) -> Tensor:
        """Returns what is added at weight 1 to a piece of the parameter, in the model's shape."""

        def read(*roles: str) -> dict[str, Tensor]:
            return {role: tensor.to(stored) for role, tensor in self._adapter.read(change, roles).items()}

        rows = slice(None) if target.number is not None else slice(number * len(stored), (number + 1) * len(stored))
        if target.parameter.endswith(".bias"):
            biases = read(*(role for role in _BIASES if role in change.keys))
            scales = {"diff_b": 1.0, "up_bias": self._adapter.scale(change)[0] if "up_bias" in biases else 1.0}
            return _sum([scales[role] * tensor for role, tensor in biases.items()])[rows]
        parts = list(read(*({"diff", "diff_m"} & change.keys.keys())).values())
        if factors := read(*factors_of(change.keys)):
            parts.append(product(factors).mul_(self._adapter.scale(change)[0]))
        delta = _sum([arrange(target.parameter, part.reshape(target.shape))[rows] for part in parts])
        if change.magnitude is None:
            return delta
        magnitudes = self.files.read(change.magnitude).to(stored)
        by_row = "magnitude" in change.keys or magnitudes.numel() == len(magnitudes)  # else of shape (1, inputs)
        magnitudes = magnitudes.reshape(-1, 1)[rows] if by_row else magnitudes.reshape(1, -1)
        return with_magnitudes(stored + delta, magnitudes) - stored

    def _is_of_image(self, change: Change, targets: Mapping[str, _Target], model: CausalDiT) -> bool:
        """Returns whether a change is of a module that only image-to-video models have, or of their patch embedding."""
        module = flat(change.module)
        if not model.config.image_dim and _OF_IMAGE.search(module):
            return True
        target = targets.get(f"{module}.weight")
        if target is None or target.parameter != "patch_embedding.weight":
            return False
        shapes = {role: self.files.tensors[name].shape for role, name in change.keys.items()}
        columns = prod(target.shape[1:])
        read = [prod(shape[1:]) for role, shape in shapes.items() if role in ("down", "diff")]
        return any(count > columns and count * target.shape[1] % columns == 0 for count in read)

    def _assign(self, change: Change, targets: Mapping[str, _Target]) -> list[str]:
        """Adds a change to the parameters that it changes; returns its keys that fit none."""
        module = flat(change.module)
        weight, bias = targets.get(f"{module}.weight", targets.get(module)), targets.get(f"{module}.bias")
        if "diff_m" in change.keys:
            weight = targets.get(f"{module}_modulation", weight)
        biases = [role for role in _BIASES if role in change.keys]
        others = [role for role in change.keys if role not in (*_BIASES, "alpha")]
        if (weight is None and (others or not biases)) or (bias is None and biases):
            return list(change.keys.values())
        for target, present in ((weight, others), (bias, biases)):
            if target is not None and present:
                self._check(target, change, present)
                self.changes.setdefault(target.parameter, []).append((target, change))
        return []

    def _check(self, target: _Target, change: Change, roles: list[str]) -> None:
        """Raises CheckpointError if tensors of a change have shapes or dtypes that do not fit its target."""
        shapes = {role: self.files.tensors[change.keys[role]].shape for role in roles}
        for role in roles:
            dtype = self.files.tensors[change.keys[role]].dtype
            if dtype not in DTYPES.values():
                raise CheckpointError(f"{self.path}: {printable(change.keys[role])} is stored as {dtype}")
        if factors_of(roles):
            self._adapter.scale(change)  # raises for a rank of 0 and for an alpha that is none
        wrong = [role for role in roles if not _fits(role, shapes, target)]
        if wrong:
            described = ", ".join(f"{printable(change.keys[role])} is {shapes[role]}" for role in wrong)
            raise CheckpointError(f"{self.path}: {described}, which does not fit {target.shape}")


def _sum(parts: list[Tensor]) -> Tensor:
    """The sum of one or more tensors, without a copy of a lone one, which may be large."""
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)


def _fits(role: str, shapes: Mapping[str, Shape], target: _Target) -> bool:
    """Returns whether the tensor of a role fits its target; the factors of a product fit together or not at all."""
    shape, rows = shapes[role], target.shape[0]
    if role in ("diff", "diff_m"):
        return shape == target.shape
    if role in _BIASES:
        return shape == (rows,)
    if role == "magnitude":
        return prod(shape) == rows
    if role == "dora_scale":  # a norm for each row, or for each column of a matrix that is stored in one piece
        of_columns = shape == (1, *target.shape[1:]) and target.number is not None and len(shape) == 2
        return (len(shape) > 0 and shape[0] == rows == prod(shape)) or of_columns
    try:
        made = product({r: torch.empty(shapes[r], device="meta") for r in factors_of(shapes)})
    except (RuntimeError, IndexError, ValueError):
        return False
    return made.ndim > 1 and made.shape[0] == rows and made.numel() == prod(target.shape)


def _targets(model: CausalDiT) -> Iterator[tuple[str, _Target]]:
    """Yields every name that a LoRA may use, of either layout, in the one spelling of `flat`."""
    layouts = [layout.names(model.config.num_layers, model.config.image_dim > 0) for layout in (WAN, DIFFUSERS)]
    for parameter, shaped in model.named_parameters():
        for names in layouts:
            stored = names[parameter]
            shape = stored_shape(parameter, tuple(shaped.shape), len(stored), model.config)
            for number, name in enumerate(stored):
                yield _flat_parameter(name), _Target(parameter, number, shape)
        module, _, end = parameter.rpartition(".")
        fused = next((whole for whole in FUSED if module.endswith(whole)), None)
        if fused is not None:
            for alias in (fused, *FUSED[fused]):
                name = f"{module.removesuffix(fused)}{alias}.{end}"
                yield _flat_parameter(name), _Target(parameter, None, tuple(shaped.shape))


def _flat_parameter(name: str) -> str:
    """Returns a parameter's name with its module in the spelling of `flat`; one that is no module's is flat itself."""
    module, _, end = name.rpartition(".")
    return f"{flat(module)}.{end}" if end in ("weight", "bias") else flat(name)
