"""An open adapter file: the changes that it holds by module, and the scale of each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path

from torch import Tensor

from causalrope_sp.errors import CheckpointError, printable
from causalrope_sp.weights.adapter_math import kind_of, lacking, rank_of
from causalrope_sp.weights.adapter_names import is_adapter, parse_key, unmerged_kind, writers
from causalrope_sp.weights.adapter_scale import AdapterScale
from causalrope_sp.weights.messages import SHOWN, some
from causalrope_sp.weights.tensor_files import WeightFiles
from causalrope_sp.weights.wrappings import LORA_PARTS, PARTS, bare_names

_DIFFERENCES = {"diff", "diff_b", "diff_m"}


@dataclass
class Change:
    """What a file holds for one module.

    Attributes:
        module: the module in the words of its layout.
        peft_module: the name by which PEFT's patterns call it.
        keys: role -> the name of the tensor that has it.
    """

    module: str
    peft_module: str
    keys: dict[str, str] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """ "LoRA", "LoHa", "LoKr", the same with DoRA's magnitudes, or "difference"."""
        low_rank = kind_of(self.keys)
        if self.magnitude is not None:
            return "DoRA" if low_rank in (None, "LoRA") else f"DoRA over {low_rank}"
        return low_rank or "difference"

    @property
    def magnitude(self) -> str | None:
        """The name of the tensor of DoRA's magnitudes."""
        return self.keys.get("magnitude", self.keys.get("dora_scale"))


@dataclass(frozen=True)
class AdapterReport:
    """What an adapter file is, as `inspect` and the log at loading say it.

    Attributes:
        path: the file, as the caller named it.
        kinds: how many modules have a change of each kind.
        writers: the prefixes of its names, each with whose files have it.
        ranks: the ranks, sorted.
        scales: how many modules have each scale, alpha / r, and what says alpha.
        unknown: the keys of no known form.
    """

    path: Path
    kinds: dict[str, int]
    writers: tuple[str, ...]
    ranks: tuple[int, ...]
    scales: dict[tuple[float, str], int]
    unknown: tuple[str, ...]

    def __str__(self) -> str:
        kinds = ", ".join(f"{kind} on {_modules(count)}" for kind, count in self.kinds.items())
        ranks = f"; rank {_span(self.ranks)}" if self.ranks else ""
        scales = [f"scale {scale:g} ({source}) on {_modules(count)}" for (scale, source), count in self.scales.items()]
        if len(scales) > SHOWN:  # ranks that were chosen module by module
            values, sources = zip(*self.scales, strict=True)
            scales = [f"scale {_span(sorted(values))} ({', '.join(dict.fromkeys(sources))})"]
        return "; ".join([f"{self.path}: {kinds}{ranks}", *scales])


def _span(numbers: Sequence[float]) -> str:
    """Sorted numbers as text, of many the first and the last."""
    shown = [f"{number:g}" for number in numbers]
    return " and ".join(shown) if len(shown) <= SHOWN else f"{shown[0]} to {shown[-1]}"


def _modules(count: int) -> str:
    return "1 module" if count == 1 else f"{count} modules"


def inspect_adapter(path: str | PathLike[str]) -> AdapterReport | None:
    """Reports what an adapter file is, from its headers and its `.alpha` tensors.

    Args:
        path: the file or folder.

    Returns:
        The report; None if the file is no adapter.

    Raises:
        CheckpointError: the file cannot be read, or is an adapter that cannot be merged.
    """
    files = WeightFiles(Path(path), parts=(*PARTS, *LORA_PARTS))  # of a file that has a model too, the model counts
    if not is_adapter(bare_names(files.tensors, path), ("self_attn", "attn1")):
        return None
    return AdapterFile(Path(path)).report()


class AdapterFile:
    """An open adapter file.

    Args:
        path: the file or folder.
        alpha: replaces the alpha that the file says; None to follow the file.

    Attributes:
        files: its open files.
        changes: what it holds for each module, in the file's order.
        unknown: the keys of no known form.
        prefixes: the prefixes of its keys.

    Raises:
        CheckpointError: the file cannot be read, holds an adapter that is not merged, the same tensor twice, or a
            change without all of its tensors.
    """

    def __init__(self, path: Path, alpha: float | None = None) -> None:
        self.path = path
        self.files = WeightFiles(path, parts=LORA_PARTS)
        self.unknown: list[str] = []
        self.prefixes = dict[str, None]()
        self.changes = self._grouped()
        self._scale = AdapterScale(self.files, alpha)
        for change in self.changes.values():
            self._check_complete(change)
        if self._scale.declared.get("use_dora") and not any(change.magnitude for change in self.changes.values()):
            raise CheckpointError(f"{path}: declares use_dora and holds no magnitudes of DoRA")

    def scale(self, change: Change) -> tuple[float, str]:
        """Returns the factor of a low-rank change, without the caller's weight, and what says its alpha.

        Raises:
            CheckpointError: alpha cannot be read or is not finite, or the rank is 0.
        """
        rank = rank_of(self._shapes(change))
        if rank == 0:
            raise CheckpointError(f"{self.path}: {printable(change.module)} has rank 0, expected at least 1")
        stored = None
        if "alpha" in change.keys:
            alpha = self.files.read(change.keys["alpha"])
            if alpha.numel() != 1:
                raise CheckpointError(
                    f"{self.path}: {printable(change.keys['alpha'])} is {tuple(alpha.shape)}, expected one number"
                )
            stored = float(alpha)
        return self._scale.of(change.peft_module, rank, stored)

    def read(self, change: Change, roles: Sequence[str]) -> dict[str, Tensor]:
        """Reads the tensors of some roles of a change.

        Raises:
            CheckpointError: one cannot be read.
        """
        return {role: self.files.read(change.keys[role]) for role in roles}

    def report(self) -> AdapterReport:
        """Describes the file.

        Raises:
            CheckpointError: a scale is not a finite number.
        """
        low_rank = [change for change in self.changes.values() if kind_of(change.keys)]
        return AdapterReport(
            path=self.path,
            kinds=dict(Counter(change.kind for change in self.changes.values())),
            writers=tuple(writers(prefix) for prefix in self.prefixes),
            ranks=tuple(sorted({rank for change in low_rank if (rank := rank_of(self._shapes(change)))})),
            scales=dict(Counter(self.scale(change) for change in low_rank)),
            unknown=tuple(self.unknown),
        )

    def _shapes(self, change: Change) -> dict[str, tuple[int, ...]]:
        return {role: self.files.tensors[key].shape for role, key in change.keys.items()}

    def _grouped(self) -> dict[str, Change]:
        """Groups the file's keys by module; adds those of no known form to `unknown`."""
        changes: dict[str, Change] = {}
        for bare, name in bare_names(self.files.tensors, self.path).items():
            key = parse_key(bare)
            if key is None:
                if kind := unmerged_kind(bare):
                    raise CheckpointError(
                        f"{self.path}: holds an adapter of the kind {kind} ({printable(name)}), which is not merged; "
                        "LoRA, DoRA, LoHa, LoKr and differences are"
                    )
                self.unknown.append(name)
                continue
            self.prefixes[key.prefix] = None
            change = changes.setdefault(key.module, Change(key.module, key.peft_module))
            if key.role in change.keys:
                raise CheckpointError(
                    f"{self.path}: {printable(change.keys[key.role])} and {printable(name)} are the same twice"
                )
            change.keys[key.role] = name
        return changes

    def _check_complete(self, change: Change) -> None:
        """Raises CheckpointError if a change lacks tensors that it needs."""
        needed = lacking(change.keys)
        low_rank = kind_of(change.keys)
        if needed is None and not low_rank and not _DIFFERENCES & change.keys.keys():
            needed = "down and up"  # an alpha, a bias or magnitudes alone
        if needed is not None or (change.magnitude is not None and not low_rank):
            raise CheckpointError(
                f"{self.path}: {printable(change.module)} has only {some(change.keys)} of {needed or 'down and up'}"
            )
