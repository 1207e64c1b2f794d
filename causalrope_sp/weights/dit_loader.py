"""Loading of a checkpoint into the causal DiT: each parameter is read once, merged with LoRAs, cast or quantized to
fp8, and written to its device. Ranks that load the same model read a part of it each and broadcast that part.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Collection, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from causalrope_sp.config import DiTConfig
from causalrope_sp.errors import CheckpointError, ConfigError
from causalrope_sp.models.causal_dit import CausalDiT
from causalrope_sp.models.fp8_linear import STORED
from causalrope_sp.weights.checkpoint_report import CheckpointReport
from causalrope_sp.weights.digest import fingerprint
from causalrope_sp.weights.examine import Examined, examine
from causalrope_sp.weights.finite import all_finite, copy_finite, refuse_broken
from causalrope_sp.weights.fp8 import (
    PARTS,
    check_dynamic,
    keep_fp8,
    largest_numbers,
    quantize_blocks,
    quantized,
    to_fp8,
)
from causalrope_sp.weights.key_layout import arrange
from causalrope_sp.weights.lora import Lora, LoraMerge
from causalrope_sp.weights.readers import Alone, Readers, owners

Weights = Literal["full", "fp8", "fp8-dynamic"]

_log = logging.getLogger(__name__)


def inspect_checkpoint(
    path: str | PathLike[str], *, config: DiTConfig | None = None, part: str | None = None
) -> CheckpointReport:
    """Reports what a checkpoint is, from its headers; no weights are read.

    Args:
        path: a file, the index of a sharded checkpoint, or a folder with one checkpoint in it.
        config: replaces the configuration that the checkpoint declares or implies.
        part: the name of one of several models in the file, such as "generator".

    Returns:
        The report; its `problem` says whether the checkpoint can be loaded.

    Raises:
        CheckpointError: the checkpoint cannot be read, has no known layout, or does not show its configuration.
    """
    return examine(Path(path), config, part).report


def outline_model(path: str | PathLike[str]) -> CausalDiT:
    """Builds the model of a checkpoint on the meta device, without weights, for ranks that do not run it.

    Args:
        path: as for `inspect_checkpoint`.

    Returns:
        The model, whose parameters have shapes and no memory.

    Raises:
        CheckpointError: as `inspect_checkpoint` raises it.
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
    """Loads the model of a checkpoint file or folder.

    Args:
        path: a file, the index of a sharded checkpoint, or a folder with one checkpoint in it.
        dtype: the model's dtype; None keeps the one of most of the checkpoint's numbers. In one of 16 bits, parameters
            that diffusers keeps in float32 stay so, if the checkpoint has diffusers' layout and has them in float32.
        device: the model's device. Tensors are cast and copied one by one, so the host holds one besides the file.
        config: replaces the configuration that the checkpoint declares or implies.
        part: the name of one of several models in the file, such as "generator"; None prefers the averaged weights.
        loras: LoRA files to merge, in this order; a `Lora` sets a weight.
        weights: "full" keeps all in `dtype`; "fp8" quantizes each matrix of the blocks as it is read (see `fp8`);
            "fp8-dynamic" does, and the blocks compute with activations quantized to fp8, row by row (W8A8).
        readers: the ranks that load the same model, such as `SequenceParallel.denoisers`. One of them reads each
            parameter and broadcasts it. Every rank must call, and reads all headers.

    Returns:
        The model in eval mode, without gradients.

    Raises:
        CheckpointError: on every rank, if on any the checkpoint cannot be read, has no known layout, lacks a key, has
            one too many or of a wrong shape, a LoRA does not fit, or a weight is NaN or infinite.
        ConfigError: `weights` is unknown or does not run on the device in `dtype`, or the files of the ranks differ.
    """
    if weights not in get_args(Weights):
        raise ConfigError(f"weights must be {' or '.join(get_args(Weights))}, not {weights!r}")
    checkpoint, merges = readers.run_collectively(lambda: _open(Path(path), config, part, loras))
    if readers.size > 1:
        _agree(checkpoint, merges, readers)
    if readers.rank == 0:
        for merge in merges:
            _log.info("%s, weight %g", merge.report(), merge.lora.weight)
    model, target, kind = checkpoint.model, torch.device(device), dtype or checkpoint.report.dtype
    if weights == "fp8-dynamic":
        check_dynamic(target, kind)
    to_quantize = frozenset(quantized(model)) if weights != "full" else frozenset[str]()
    buffers = {
        name: _allocate(shaped.shape, checkpoint.dtype_of(name, kind), target, name in to_quantize)
        for name, shaped in model.named_parameters()
    }
    _fill_on_ranks(checkpoint, buffers, merges, kind, readers)
    if to_quantize:
        quantize_blocks(model, dynamic=weights == "fp8-dynamic")
    model.load_state_dict(_state(buffers, to_quantize), strict=True, assign=True)
    return model.eval().requires_grad_(False)


class Remerge:
    """Other LoRAs for a loaded model, opened and matched to it, and not merged yet.

    Args:
        model: the model, as `load_model` made it of the checkpoint, perhaps cast or moved since.
        path: the checkpoint.
        loras: the LoRAs that the model is to have, in this order.
        readers: as for `load_model`.

    Attributes:
        parameters: the names of the parameters that these LoRAs change.

    Raises:
        CheckpointError, ConfigError: as `load_model` raises them. The model is as it was.
    """

    def __init__(
        self,
        model: CausalDiT,
        path: str | PathLike[str],
        loras: Sequence[str | PathLike[str] | Lora],
        readers: Readers = Alone(),
    ) -> None:
        self._model, self._readers = model, readers
        self._checkpoint, self._merges = readers.run_collectively(lambda: _open(Path(path), model.config, None, loras))
        if readers.size > 1:
            _agree(self._checkpoint, self._merges, readers)
        self.parameters = frozenset(parameter for merge in self._merges for parameter in merge.changes)

    def write(self, changed: Collection[str]) -> None:
        """Reads the parameters again that these LoRAs or earlier ones change, in place, and merges these into them.

        What earlier LoRAs changed has the bits of the checkpoint again where these do not change it.

        Args:
            changed: the parameters that the model's present LoRAs change.

        Raises:
            CheckpointError, ConfigError: as `load_model` raises them. Any of these parameters may have been written.
        """
        state = self._model.state_dict()
        names = [name for name in self._checkpoint.names if name in self.parameters | {*changed}]
        buffers = {name: [state[key] for key in _keys(name, state)] for name in names}
        _fill_on_ranks(self._checkpoint, buffers, self._merges, self._model.dtype, self._readers)


def _fill_on_ranks(
    checkpoint: Examined,
    buffers: Mapping[str, Sequence[Tensor]],
    merges: Sequence[LoraMerge],
    dtype: torch.dtype,
    readers: Readers,
) -> None:
    """Fills buffers on every rank: each parameter is read by one of them and broadcast."""
    owner = owners([sum(buffer.nbytes for buffer in several) for several in buffers.values()], readers.size)
    own = [name for name, rank in zip(buffers, owner, strict=True) if rank == readers.rank]
    readers.run_collectively(lambda: _fill(checkpoint, {name: buffers[name] for name in own}, merges, dtype))
    for several, rank in zip(buffers.values(), owner, strict=True):
        for buffer in several:
            readers.broadcast("weights", buffer, rank)


def _keys(parameter: str, state: Mapping[str, Tensor]) -> list[str]:
    """The keys of a model's state that hold a parameter: its own, or those of its numbers and scales in fp8."""
    parts = [f"{parameter.removesuffix('weight')}{part}" for part in PARTS]
    return [parameter] if parameter in state else parts


def _open(
    path: Path, config: DiTConfig | None, part: str | None, loras: Sequence[str | PathLike[str] | Lora]
) -> tuple[Examined, list[LoraMerge]]:
    """Opens the checkpoint and its LoRAs; raises CheckpointError if they do not make a model."""
    checkpoint = examine(path, config, part)
    report = checkpoint.report
    if report.problem:
        raise CheckpointError(f"{report.path} ({report.layout} layout): {report.problem}")
    return checkpoint, [LoraMerge(lora if isinstance(lora, Lora) else Lora(lora), checkpoint.model) for lora in loras]


def _agree(checkpoint: Examined, merges: Sequence[LoraMerge], readers: Readers) -> None:
    """Raises ConfigError if ranks opened different files: parts of those would make a model that nobody trained."""
    readers.agree(_identity(checkpoint, merges))


def _identity(checkpoint: Examined, merges: Sequence[LoraMerge]) -> dict[str, object]:
    """What tells files apart, by name."""
    report = checkpoint.report
    stored = [name for several in checkpoint.names.values() for name in several]
    return {
        "checkpoint": (report.layout, report.config),
        "dtype of the checkpoint": report.dtype,
        "weights": fingerprint(checkpoint.files, stored),
        "LoRAs": [_identity_of(merge) for merge in merges],
    }


def _identity_of(merge: LoraMerge) -> tuple[object, ...]:
    lora = merge.lora
    without = ("no image",) if lora.leave_out_image else ()
    return fingerprint(merge.files, merge.files.tensors), lora.weight, lora.alpha, *without


def checkpoint_digest(path: str | PathLike[str], loras: Sequence[str | PathLike[str] | Lora] = ()) -> str:
    """Computes a hash of the files of a model, in whatever dtype and on however many ranks it runs.

    Args:
        path: as for `load_model`.
        loras: LoRA files that are merged.

    Returns:
        16 hexadecimal digits.

    Raises:
        CheckpointError: as `load_model` raises it for files that cannot be read.
    """
    checkpoint, merges = _open(Path(path), None, None, loras)
    return hashlib.blake2b(str(_identity(checkpoint, merges)).encode(), digest_size=8).hexdigest()


def _allocate(shape: torch.Size, dtype: torch.dtype, device: torch.device, fp8: bool) -> list[Tensor]:
    """Allocates the memory of a parameter: one tensor, or the numbers and scales of an `Fp8Linear`."""
    if not fp8:
        return [torch.empty(shape, dtype=dtype, device=device)]
    numbers = torch.empty(shape, dtype=torch.uint8, device=device).view(STORED)
    return [numbers, torch.empty(shape[:1], dtype=torch.float32, device=device)]


def _fill(
    checkpoint: Examined, buffers: Mapping[str, Sequence[Tensor]], merges: Sequence[LoraMerge], dtype: torch.dtype
) -> None:
    """Reads some parameters into their buffers, one stored tensor after the other. The model computes in `dtype`.

    The numbers are copied, because a stored tensor is a view of its file, which may change later.
    """
    broken: list[str] = []
    for parameter, several in buffers.items():
        names = checkpoint.names[parameter]
        parts = zip(*(tensor.chunk(len(names)) for tensor in several), strict=True)
        for number, (pieces, name) in enumerate(zip(parts, names, strict=True)):
            unmerged = len(pieces) == 2 and not any(parameter in merge.changes for merge in merges)
            if unmerged and keep_fp8(checkpoint.files.fp8(name), pieces, dtype):
                continue
            stored = arrange(parameter, checkpoint.files.take(name))
            for merge in merges:
                stored = merge.into(stored, parameter, number, several[0].device)
            if len(pieces) == 1:
                finite = copy_finite(pieces[0], stored)
            else:
                for piece, made in zip(pieces, to_fp8(stored.to(several[0].device), dtype), strict=True):
                    piece.copy_(made)
                finite = all_finite(largest_numbers(pieces[0], pieces[1], dtype)) and all_finite(stored)
            if not finite:
                broken.append(name)
    refuse_broken(checkpoint.report.path, broken, dtype)


def _state(buffers: Mapping[str, Sequence[Tensor]], fp8: Collection[str]) -> dict[str, Tensor]:
    """Returns the model's state: each buffer under the name that the model has it by."""
    state: dict[str, Tensor] = {}
    for name, several in buffers.items():
        keys = [f"{name.removesuffix('weight')}{part}" for part in PARTS] if name in fp8 else [name]
        state |= dict(zip(keys, several, strict=True))
    return state
