"""From a path to a model: the parameters themselves, each read once, merged, cast and laid out on its device."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor

from causalrope_sp.config import DiTConfig
from causalrope_sp.errors import CheckpointError
from causalrope_sp.model import CausalDiT
from causalrope_sp.weights.examine import Examined, examine
from causalrope_sp.weights.finite import all_finite
from causalrope_sp.weights.layout import arrange
from causalrope_sp.weights.lora import Lora, LoraMerge
from causalrope_sp.weights.messages import some
from causalrope_sp.weights.report import CheckpointReport


def inspect_checkpoint(
    path: str | PathLike[str], *, config: DiTConfig | None = None, part: str | None = None
) -> CheckpointReport:
    """What the checkpoint at `path` is, from its headers; a model is not built.

    Raises:
        CheckpointError: it cannot be read, is of no known layout, or does not tell its configuration.
    """
    return examine(Path(path), config, part).report


def outline_model(path: str | PathLike[str]) -> CausalDiT:
    """The model of a checkpoint without its weights, on the meta device, for ranks that do not run it.

    Raises:
        CheckpointError: as `inspect_checkpoint`.
    """
    return examine(Path(path), None, None).model


def load_model(
    path: str | PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    config: DiTConfig | None = None,
    part: str | None = None,
    loras: Sequence[str | PathLike[str] | Lora] = (),
) -> CausalDiT:
    """The model of a checkpoint file or folder, ready to run: in eval mode, without gradients.

    Args:
        path: a file, a sharded checkpoint's index, or a folder with one checkpoint in it.
        dtype: of the model; None keeps the checkpoint's, the one of most of its numbers.
        device: where the model goes; each tensor is cast and sent there by itself, so that the host never holds more
            than one besides the file's own pages.
        config: overrules what the checkpoint says.
        part: which of several models in the file ("generator"); None takes the averaged one where there is one.
        loras: LoRA files that are merged, in this order; `Lora` gives one a weight.

    Raises:
        CheckpointError: it cannot be read, is of no known layout, a key is missing, left over or of a wrong shape, a
            LoRA does not fit, or a weight is NaN or infinite.
    """
    checkpoint = examine(Path(path), config, part)
    report = checkpoint.report
    if report.problem:
        raise CheckpointError(f"{report.path} ({report.layout} layout): {report.problem}")
    merges = [LoraMerge(lora if isinstance(lora, Lora) else Lora(lora), checkpoint.model) for lora in loras]
    _fill(checkpoint, dtype or report.dtype, torch.device(device), merges)
    return checkpoint.model.eval().requires_grad_(False)


def _fill(checkpoint: Examined, dtype: torch.dtype, device: torch.device, merges: Sequence[LoraMerge]) -> None:
    """Gives the model its parameters, one stored tensor after the other.

    They are copied into memory of their own: what a file gives is a view of it, and it may change later.
    """
    state: dict[str, Tensor] = {}
    broken: list[str] = []
    for parameter, shaped in checkpoint.model.named_parameters():
        state[parameter] = torch.empty(shaped.shape, dtype=dtype, device=device)
        names = checkpoint.names[parameter]
        for number, (piece, name) in enumerate(zip(state[parameter].chunk(len(names)), names, strict=True)):
            stored = arrange(parameter, checkpoint.files.take(name))
            for merge in merges:
                stored = merge.into(stored, parameter, number, device)
            piece.copy_(stored)
            if not all_finite(piece):
                broken.append(name)
    if broken:
        raise CheckpointError(
            f"{checkpoint.report.path}: {len(broken)} NaN or infinite in {str(dtype).removeprefix('torch.')}: "
            f"{some(broken)}"
        )
    checkpoint.model.load_state_dict(state, strict=True, assign=True)
