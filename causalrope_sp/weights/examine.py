"""Examination of a checkpoint by its headers: layout, wrapping, configuration, missing and unexpected keys."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

from causalrope_sp.config import DiTConfig
from causalrope_sp.devices import on_meta
from causalrope_sp.errors import CheckpointError, printable
from causalrope_sp.models.causal_dit import CausalDiT
from causalrope_sp.weights.adapter_names import is_adapter
from causalrope_sp.weights.checkpoint_report import CheckpointReport, most_common_dtype
from causalrope_sp.weights.diffusers_keys import DIFFUSERS
from causalrope_sp.weights.infer import infer_config
from causalrope_sp.weights.key_layout import Layout, Names, stored_shape
from causalrope_sp.weights.messages import some
from causalrope_sp.weights.model_presets import guess_preset
from causalrope_sp.weights.models_beside import models_beside
from causalrope_sp.weights.networks import network
from causalrope_sp.weights.quantized_formats import refuse_quantized
from causalrope_sp.weights.tensor_files import DTYPES, Stored, WeightFiles
from causalrope_sp.weights.wan_keys import WAN
from causalrope_sp.weights.wrappings import Wrapping, bare_names, choose_prefix, wrapping_modules

LAYOUTS = (WAN, DIFFUSERS)


@dataclass(frozen=True)
class Examined:
    """An open checkpoint.

    Attributes:
        files: its open files.
        layout: its key layout.
        names: each parameter of the model -> the stored names of the tensors that make it up, in order.
        model: the model on the meta device, which has shapes and no memory.
        report: what the user is shown.
        wide: the parameters that stay in float32 in a model of 16 bits.
    """

    files: WeightFiles
    layout: Layout
    names: Names
    model: CausalDiT
    report: CheckpointReport
    wide: frozenset[str]

    def dtype_of(self, parameter: str, dtype: torch.dtype) -> torch.dtype:
        """Returns the dtype of a parameter in a model that computes in `dtype`: float32 for one that the layout keeps
        wide, if `dtype` has 16 bits and the file has more, else `dtype`."""
        return torch.float32 if dtype.itemsize == 2 and parameter in self.wide else dtype


@dataclass(frozen=True)
class _Found:
    """The tensors of one model: layout's name -> stored name, and in `rest` the stored names of no model."""

    layout: Layout
    wrapping: Wrapping
    why: str
    stored: dict[str, str]
    rest: list[str]


def examine(path: Path, config: DiTConfig | None, part: str | None) -> Examined:
    """Opens a checkpoint and compares its headers with the model that it is for.

    Args:
        path: a file, the index of a sharded checkpoint, or a folder with one checkpoint in it.
        config: replaces the configuration that the checkpoint declares or implies.
        part: the name of one of several models in the file; None takes the one meant for use.

    Returns:
        The open checkpoint, also if keys are missing; its report says so.

    Raises:
        CheckpointError: the checkpoint cannot be read, has no known layout, or does not show its configuration.
    """
    files = WeightFiles(path, part)
    refuse_quantized(files)
    found = _detect(files, part)
    tensors = {name: files.tensors[stored] for name, stored in found.stored.items()}
    declared = files.declared_config()
    config, assumed = (config, ()) if config else infer_config(tensors, declared, found.layout, path)
    model = _on_meta(config, path)
    names = found.layout.names(config.num_layers, config.image_dim > 0)
    missing, misshapen, sizes = _compare(model, names, tensors, path)
    wide = frozenset(p for p, several in names.items() if _is_wide(found.layout, several, tensors))
    expected = {name for several in names.values() for name in several}
    report = CheckpointReport(
        path=path,
        layout=found.layout.name,
        why=found.why,
        wrapping=found.wrapping,
        config=config,
        assumed=assumed,
        dtype=most_common_dtype(sizes),
        dtypes=sizes,
        wide_parameters=sum(prod(tensors[name].shape) for p in wide for name in names[p]),
        preset=guess_preset(path, files.files[0], found.wrapping, declared, config),
        missing=missing,
        unexpected=sorted(
            printable(n) for n in (*(s for b, s in found.stored.items() if b not in expected), *found.rest)
        ),
        misshapen=misshapen,
        beside=models_beside(path),
        passed_by=tuple(printable(name) for name in files.passed_by),
    )
    stored = {
        parameter: tuple(found.stored.get(name, name) for name in several) for parameter, several in names.items()
    }
    return Examined(files, found.layout, stored, model, report, wide)


def _is_wide(layout: Layout, names: Sequence[str], tensors: Mapping[str, Stored]) -> bool:
    """Returns whether the layout keeps the parameter of these stored tensors wide, and the file has it so."""
    return all(
        layout.keeps_wide(name) and name in tensors and tensors[name].dtype in (torch.float32, torch.float64)
        for name in names
    )


def _detect(files: WeightFiles, part: str | None) -> _Found:
    """Finds the layout, and the prefix of the model that is asked for."""
    names = bare_names(files.tensors, files.path)
    if is_adapter(names, [layout.marker for layout in LAYOUTS]):
        raise CheckpointError(f"{files.path}: a LoRA, to be given to load_model as one of `loras` beside its model")
    if inside := next((name for name in names if ".base_layer." in name), None):
        raise CheckpointError(
            f"{files.path}: a model with a LoRA that is not merged ({printable(inside)}); save it after PEFT's "
            "merge_and_unload"
        )
    for layout in LAYOUTS:
        prefixes = layout.prefixes_in(names)
        if not prefixes:
            continue
        prefix = choose_prefix(prefixes, part, files.path)
        if part is not None and part not in (*files.parts, *prefix.split(".")):
            available = (*files.parts, *files.auxiliary, *(p for p in prefixes if p))
            raise CheckpointError(
                f"{files.path}: has no part {printable(part)}; it has: {some(available) or 'one model alone'}"
            )
        found = network(prefix, names)
        wrapping = Wrapping(
            files.parts, prefix, wrapping_modules(files.tensors), (*files.auxiliary, *filter(None, found.others))
        )
        example = next(name for name in found.own.values() if f".{layout.marker}." in name)
        why = f"its blocks have {layout.marker}: {printable(example)}"
        return _Found(layout, wrapping, why, found.own, found.rest)
    known = " or ".join(f"{layout.name} (blocks.0.{layout.marker}...)" for layout in LAYOUTS)
    keys = some(list(files.tensors)) or "none"
    raise CheckpointError(f"{files.path}: not a Wan transformer: none of its keys ({keys}) is of the layout {known}")


def _on_meta(config: DiTConfig, path: Path) -> CausalDiT:
    """Builds the model without memory; sizes that torch refuses raise CheckpointError."""
    try:
        with on_meta():
            return CausalDiT(config)
    except (RuntimeError, TypeError, OverflowError) as error:
        raise CheckpointError(f"{path}: declares a model that cannot be built: {str(error).splitlines()[0]}") from error


def _compare(
    model: CausalDiT, names: Names, tensors: dict[str, Stored], path: Path
) -> tuple[list[str], list[str], Counter[torch.dtype]]:
    """Returns the missing keys, a text for each key of a wrong shape, and the count of numbers of each dtype."""
    missing, misshapen, sizes = [], [], Counter[torch.dtype]()
    for parameter, shaped in model.named_parameters():
        expected = stored_shape(parameter, tuple(shaped.shape), len(names[parameter]), model.config)
        for name in names[parameter]:
            if name not in tensors:
                missing.append(name)
                continue
            shape, dtype = tensors[name].shape, tensors[name].dtype
            if shape != expected:
                misshapen.append(f"{name} is {printable(shape)}, expected {expected}")
            if not isinstance(dtype, torch.dtype) or dtype not in DTYPES.values():
                raise CheckpointError(f"{path}: {name} is stored as {dtype}, not as float64, 32, 16 or bfloat16")
            sizes[dtype] += prod(shape)
    return missing, misshapen, sizes
