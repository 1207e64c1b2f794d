"""From a path to a model: the parameters themselves, each read once, merged, cast or folded into 8 bits, and laid out
on its device. Ranks that load together read a part each and send it to the others.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from causalrope_sp.config import DiTConfig
from causalrope_sp.errors import CheckpointError, ConfigError
from causalrope_sp.models.causal_dit import CausalDiT
from causalrope_sp.weights.checkpoint_report import CheckpointReport
from causalrope_sp.weights.digest import fingerprint
from causalrope_sp.weights.examine import Examined, examine
from causalrope_sp.weights.finite import all_finite, refuse_broken
from causalrope_sp.weights.fp8 import PARTS, STORED, quantize_blocks, quantized, to_fp8
from causalrope_sp.weights.key_layout import arrange
from causalrope_sp.weights.lora import Lora, LoraMerge
from causalrope_sp.weights.readers import Alone, Readers, owners

Weights = Literal["full", "fp8"]


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
    weights: Weights = "full",
    readers: Readers = Alone(),
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
        weights: "full", all in `dtype`, or "fp8": the matrices of the blocks in 8 bits (see `fp8`), each folded as it
            is read, so that the full model is nowhere.
        readers: ranks that load the same model, such as a `SequenceParallel`'s `denoisers`: each parameter is read by
            one of them and sent to the others. Every rank must call, and reads all headers.

    Raises:
        CheckpointError: it cannot be read, is of no known layout, a key is missing, left over or of a wrong shape, a
            LoRA does not fit, or a weight is NaN or infinite; on any rank, and then on every one.
        ConfigError: an unknown `weights`, or ranks whose files differ.
    """
    if weights not in get_args(Weights):
        raise ConfigError(f"weights must be {' or '.join(get_args(Weights))}, not {weights!r}")
    checkpoint, merges = readers.run_collectively(lambda: _open(Path(path), config, part, loras))
    if readers.size > 1:
        _agree(checkpoint, merges, readers)
    model, place = checkpoint.model, torch.device(device)
    quantised = frozenset(quantized(model)) if weights == "fp8" else frozenset[str]()
    kv_slots = {
        name: _slots_of(shaped.shape, dtype or checkpoint.report.dtype, place, name in quantised)
        for name, shaped in model.named_parameters()
    }
    owner = owners([sum(room.nbytes for room in several) for several in kv_slots.values()], readers.size)
    mine = [name for name, rank in zip(kv_slots, owner, strict=True) if rank == readers.rank]
    readers.run_collectively(lambda: _fill(checkpoint, {name: kv_slots[name] for name in mine}, merges))
    for several, rank in zip(kv_slots.values(), owner, strict=True):
        for room in several:
            readers.broadcast("weights", room, rank)
    if quantised:
        quantize_blocks(model)
    model.load_state_dict(_state(kv_slots, quantised), strict=True, assign=True)
    return model.eval().requires_grad_(False)


def _open(
    path: Path, config: DiTConfig | None, part: str | None, loras: Sequence[str | PathLike[str] | Lora]
) -> tuple[Examined, list[LoraMerge]]:
    checkpoint = examine(path, config, part)
    report = checkpoint.report
    if report.problem:
        raise CheckpointError(f"{report.path} ({report.layout} layout): {report.problem}")
    return checkpoint, [LoraMerge(lora if isinstance(lora, Lora) else Lora(lora), checkpoint.model) for lora in loras]


def _agree(checkpoint: Examined, merges: Sequence[LoraMerge], readers: Readers) -> None:
    """Parts of different files would make a model that nobody trained."""
    report = checkpoint.report
    said = {"checkpoint": (report.layout, report.config), "dtype of the checkpoint": report.dtype}
    stored = [name for several in checkpoint.names.values() for name in several]
    said["weights"] = fingerprint(checkpoint.files, stored)
    said["LoRAs"] = [(fingerprint(merge.files, merge.files.tensors), merge.lora.weight) for merge in merges]
    readers.agree(said)


def _slots_of(shape: torch.Size, dtype: torch.dtype, device: torch.device, quantised: bool) -> list[Tensor]:
    """Memory for a parameter: one tensor, or the numbers and scales of an `Fp8Linear`."""
    if not quantised:
        return [torch.empty(shape, dtype=dtype, device=device)]
    numbers = torch.empty(shape, dtype=torch.uint8, device=device).view(STORED)
    return [numbers, torch.empty(shape[:1], dtype=torch.float32, device=device)]


def _fill(checkpoint: Examined, kv_slots: Mapping[str, Sequence[Tensor]], merges: Sequence[LoraMerge]) -> None:
    """Reads some parameters into their rooms, one stored tensor after the other.

    They are copied into memory of their own: what a file gives is a view of it, and it may change later.
    """
    broken: list[str] = []
    dtype = checkpoint.report.dtype
    for parameter, room in kv_slots.items():
        names = checkpoint.names[parameter]
        parts = zip(*(tensor.chunk(len(names)) for tensor in room), strict=True)
        for number, (pieces, name) in enumerate(zip(parts, names, strict=True)):
            stored = arrange(parameter, checkpoint.files.take(name))
            for merge in merges:
                stored = merge.into(stored, parameter, number, room[0].device)
            if len(pieces) == 1:
                pieces[0].copy_(stored)
                stored, dtype = pieces[0], pieces[0].dtype
            else:
                for piece, made in zip(pieces, to_fp8(stored.to(room[0].device)), strict=True):
                    piece.copy_(made)
                largest = pieces[0].float().abs().amax(1) * pieces[1]  # of each row as it is unfolded
                stored = stored if all_finite(largest) else largest
            if not all_finite(stored):
                broken.append(name)
    refuse_broken(checkpoint.report.path, broken, dtype)


def _state(kv_slots: Mapping[str, Sequence[Tensor]], quantised: Collection[str]) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for name, room in kv_slots.items():
        keys = [f"{name.removesuffix('weight')}{part}" for part in PARTS] if name in quantised else [name]
        state |= dict(zip(keys, room, strict=True))
    return state
