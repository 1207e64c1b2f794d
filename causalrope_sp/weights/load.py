"""From a path to a model: which layout, which configuration, what is wrong, and the parameters themselves."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from causalrope_sp.config import DiTConfig
from causalrope_sp.errors import CheckpointError, ConfigError
from causalrope_sp.model import CausalDiT
from causalrope_sp.weights.diffusers import DIFFUSERS
from causalrope_sp.weights.files import WeightFiles
from causalrope_sp.weights.layout import Layout, Names, arrange, stored_shape
from causalrope_sp.weights.wan import WAN

LAYOUTS = (WAN, DIFFUSERS)
WAN_HEAD_DIM = 128  # every published Wan; what is assumed where a checkpoint does not say
SHOWN = 4  # keys of a kind that a message names


@dataclass(frozen=True)
class CheckpointReport:
    """What a checkpoint is, and what keeps it from being loaded."""

    path: Path
    layout: str
    config: DiTConfig
    dtype: torch.dtype
    parameters: int
    missing: list[str]
    unexpected: list[str]
    misshapen: list[str] = field(default_factory=list)  # "key is (expected) there (given)"

    @property
    def problem(self) -> str | None:
        """All that is wrong, in one line; None if the checkpoint can be loaded."""
        return problem(self.missing, self.unexpected, self.misshapen)


@dataclass(frozen=True)
class _Checkpoint:
    files: WeightFiles
    prefix: str
    names: Names
    model: CausalDiT  # on the meta device: shapes, no memory
    report: CheckpointReport


def inspect_checkpoint(path: str | PathLike[str], *, config: DiTConfig | None = None) -> CheckpointReport:
    """What the checkpoint at `path` is, from its headers; a model is not built.

    Raises:
        CheckpointError: it cannot be read, is of no known layout, or does not tell its configuration.
    """
    return _examine(Path(path), config).report


def load_model(
    path: str | PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    config: DiTConfig | None = None,
) -> CausalDiT:
    """The model of a checkpoint file or folder, ready to run: in eval mode, without gradients.

    `dtype` None keeps the checkpoint's, the one of most of its numbers; `config` overrules what the checkpoint says.

    Raises:
        CheckpointError: it cannot be read, is of no known layout, or a key is missing, left over or of a wrong shape.
    """
    checkpoint = _examine(Path(path), config)
    report = checkpoint.report
    if report.problem:
        raise CheckpointError(f"{report.path} ({report.layout} layout): {report.problem}")
    state = {}
    for parameter, shaped in checkpoint.model.named_parameters():
        # Copied piece by piece into memory of its own: what `read` gives is a view of the file, which may change later.
        state[parameter] = torch.empty_like(shaped, dtype=dtype or report.dtype, device=device)
        stored = checkpoint.names[parameter]
        for part, name in zip(state[parameter].chunk(len(stored)), stored, strict=True):
            part.copy_(arrange(parameter, checkpoint.files.read(checkpoint.prefix + name)))
    checkpoint.model.load_state_dict(state, strict=True, assign=True)
    return checkpoint.model.eval().requires_grad_(False)


def _examine(path: Path, config: DiTConfig | None) -> _Checkpoint:
    files = WeightFiles(path)
    layout, prefix = _detect(files)
    config = config or _infer_config(files, layout, prefix)
    names = layout.names(config.num_layers)
    try:
        with torch.device("meta"):
            model = CausalDiT(config)
    except (RuntimeError, TypeError, OverflowError) as error:
        raise CheckpointError(f"{path}: declares a model that cannot be: {str(error).splitlines()[0]}") from error
    missing, misshapen, seen = [], [], set()
    for parameter, shaped in model.named_parameters():
        stored = names[parameter]
        expected = stored_shape(parameter, tuple(shaped.shape), len(stored), config)
        for name in (prefix + s for s in stored):
            if name not in files.tensors:
                missing.append(name)
                continue
            seen.add(name)
            if files.tensors[name].shape != expected:
                misshapen.append(f"{name} is {files.tensors[name].shape}, expected {expected}")
    sizes = files.numbers(seen)
    report = CheckpointReport(
        path=path,
        layout=layout.name,
        config=config,
        dtype=sizes.most_common(1)[0][0],
        parameters=sizes.total(),
        missing=missing,
        unexpected=sorted(files.tensors.keys() - seen),
        misshapen=misshapen,
    )
    return _Checkpoint(files, prefix, names, model, report)


def _detect(files: WeightFiles) -> tuple[Layout, str]:
    for layout in LAYOUTS:
        prefix = layout.prefix_in(files.tensors)
        if prefix is not None:
            return layout, prefix
    known = " or ".join(f"{layout.name} (blocks.0.{layout.marker}...)" for layout in LAYOUTS)
    found = some(list(files.tensors)) or "none"
    raise CheckpointError(f"{files.path}: not a Wan transformer: none of its keys ({found}) is of the layout {known}")


def _infer_config(files: WeightFiles, layout: Layout, prefix: str) -> DiTConfig:
    """The configuration as the checkpoint declares it, the rest from the shapes of its tensors."""
    declared = _declared_fields(files.declared_config(), layout, files.path)
    outer_and_first = layout.names(1)

    def shape(parameter: str, rank: int) -> tuple[int, ...]:
        name = prefix + outer_and_first[parameter][0]
        if name not in files.tensors:
            raise CheckpointError(f"{files.path} ({layout.name} layout): 1 missing: {name}")
        found = files.tensors[name].shape
        if len(found) != rank:
            raise CheckpointError(f"{files.path} ({layout.name} layout): {name} is {found}, expected {rank} axes")
        return found

    dim, in_channels, *patch = shape("patch_embedding.weight", 5)
    read: dict[str, Any] = {
        "dim": dim,
        "in_channels": in_channels,
        "patch_size": tuple(patch),
        "ffn_dim": shape("blocks.0.ffn.up.weight", 2)[0],
        "text_dim": shape("text_embedding.0.weight", 2)[1],
        "freq_dim": shape("time_embedding.0.weight", 2)[1],
        "num_layers": _count_layers(files, prefix),
    }
    values = read | declared
    if "num_heads" not in values:
        if dim % WAN_HEAD_DIM:
            raise CheckpointError(
                f"{files.path}: does not say how many heads it has, and its width {dim} is no multiple of "
                f"{WAN_HEAD_DIM}; give `config`, or a config.json with num_heads beside it"
            )
        values["num_heads"] = dim // WAN_HEAD_DIM
    try:
        inferred = DiTConfig(**values)
    except ConfigError as error:
        raise CheckpointError(f"{files.path}: declares a model that cannot be: {error}") from error
    if inferred.num_layers > len(files.tensors):
        raise CheckpointError(
            f"{files.path}: declares {inferred.num_layers} layers and holds {len(files.tensors)} tensors"
        )
    return inferred


def _declared_fields(declared: dict[str, Any], layout: Layout, where: Path) -> dict[str, Any]:
    """The fields of `DiTConfig` that a checkpoint declares, from its own words into ours."""
    values: dict[str, Any] = {}
    for name in (f.name for f in fields(DiTConfig)):
        word = next((w for w in (layout.config_names.get(name, name), name) if declared.get(w) is not None), None)
        if word is None:
            continue
        value = declared[word]
        several = name == "patch_size"
        numbers = value if several and isinstance(value, list) else [value]
        if isinstance(value, list) != several or not all(isinstance(number, int | float) for number in numbers):
            raise CheckpointError(
                f"{where}: declares {word} as {value!r}, not {'three numbers' if several else 'a number'}"
            )
        values[name] = tuple(value) if several else value
    head_dim = declared.get("attention_head_dim")
    if "dim" not in values and "num_heads" in values and isinstance(head_dim, int):
        values["dim"] = values["num_heads"] * head_dim
    return values


def _count_layers(files: WeightFiles, prefix: str) -> int:
    """Blocks are numbered from 0; a gap counts, so that its keys are reported as missing."""
    pattern = re.compile(re.escape(prefix) + r"blocks\.(\d{1,6})\.")
    return 1 + max(int(match[1]) for name in files.tensors if (match := pattern.match(name)))


def problem(missing: Sequence[str], unexpected: Sequence[str], misshapen: Sequence[str]) -> str | None:
    """What is wrong with a checkpoint's keys, in one line; None if nothing is."""
    kinds = (("missing", missing), ("unexpected", unexpected), ("of a wrong shape", misshapen))
    found = [f"{len(keys)} {kind}: {some(keys)}" for kind, keys in kinds if keys]
    return "; ".join(found) or None


def some(keys: Sequence[str]) -> str:
    """The first few of many."""
    rest = f" and {len(keys) - SHOWN} more" if len(keys) > SHOWN else ""
    return ", ".join(keys[:SHOWN]) + rest
