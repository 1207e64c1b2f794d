"""The scale of an adapter's changes, alpha / r, from wherever its writer put alpha.

The order: the argument of the caller, the `.alpha` tensor of the module, the declared configuration of the adapter
(PEFT's adapter_config.json, diffusers' `lora_adapter_metadata`), the file's header (`alpha`, `lora_alpha`,
`network_alpha`); without any of them alpha = r. `ss_network_alpha` of kohya's trainers is not used: they write `.alpha`
tensors, and files converted from theirs have lost these because alpha went into the matrices.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from causalrope_sp.errors import CheckpointError, printable
from causalrope_sp.weights.tensor_files import WeightFiles
from causalrope_sp.weights.weight_paths import json_object

ADAPTER_CONFIG = "adapter_config.json"
_CONFIGS = ("lora_adapter_metadata", "adapter_config", "peft_config", "lora_config")  # entries of a header
_ALPHAS = ("alpha", "lora_alpha", "network_alpha")  # likewise
_COMPONENT = "transformer."  # diffusers' prefix of the fields that are meant for the DiT
_LONGEST_PATTERN = 1000  # characters
# Starts of PEFT's training that leave another base model: what is saved is the difference from that one
_CHANGE_THE_BASE = ("pissa", "corda", "olora", "mica", "loftq", "lora_ga")
_VARIANTS = ("alora_invocation_tokens", "arrow_config", "use_qalora", "kasa_config")  # fields of PEFT's LoraConfig


class AdapterScale:
    """The scales of the changes of one adapter file.

    Args:
        files: the open file.
        alpha: replaces what the file says; None to follow the file.

    Raises:
        CheckpointError: the declared configuration is no JSON object, or is of a wrong form.
    """

    def __init__(self, files: WeightFiles, alpha: float | None) -> None:
        self._path, self._given = files.path, alpha
        self.declared = self._declared(files)
        self._refuse_other_bases()
        self._header = {name: files.beside[name] for name in _ALPHAS if name in files.beside}
        self._alphas, self._ranks = self._patterns("alpha_pattern"), self._patterns("rank_pattern")

    def of(self, module: str, rank: int | None, stored_alpha: float | None) -> tuple[float, str]:
        """Returns the factor of a low-rank change.

        Args:
            module: its name in the words of PEFT's patterns.
            rank: the rank r that its tensors have; None for a LoKr of two whole factors, which has no rank of its own.
            stored_alpha: the value of its `.alpha` tensor, if it has one.

        Returns:
            alpha / r, or alpha / √r where rank-stabilized LoRA is declared; and what says alpha, as text.

        Raises:
            CheckpointError: alpha is no finite number.
        """
        alpha, source = self._alpha(module, stored_alpha)
        if rank is None:  # PEFT divides by the declared rank, LyCORIS takes 1 whatever its alpha is
            rank = self._declared_rank(module) if source == "the adapter's configuration" else None
        if rank is None or alpha is None:
            return 1.0, "no alpha: 1" if alpha is None else "two whole factors: 1"
        value = _number(alpha)
        if value is None:
            raise CheckpointError(
                f"{self._path}: alpha of {printable(module)} must be a finite number, not {printable(alpha)} "
                f"({source}); give it as Lora(alpha=)"
            )
        rank_stabilized = source == "the adapter's configuration" and self.declared.get("use_rslora")
        return value / (math.sqrt(rank) if rank_stabilized else rank), source

    def _refuse_other_bases(self) -> None:
        """Raises CheckpointError for an adapter whose sum with the checkpoint is not what was trained."""
        start = self.declared.get("init_lora_weights")
        if isinstance(start, str) and start.lower().startswith(_CHANGE_THE_BASE):
            raise CheckpointError(
                f"{self._path}: its training changed the base model at the start (init_lora_weights "
                f"{printable(start)}); save it converted, by PEFT's path_initial_model_for_weight_conversion"
            )
        variant = next((name for name in _VARIANTS if self.declared.get(name)), None)
        if variant is not None:
            raise CheckpointError(f"{self._path}: a variant of LoRA that is not merged (it declares {variant})")

    def _alpha(self, module: str, stored: float | None) -> tuple[Any, str]:
        if self._given is not None:
            return self._given, "the argument alpha"
        if stored is not None:
            return stored, "its .alpha tensors"
        own = _first_match(self._alphas, module)
        declared = own if own is not None else self.declared.get("lora_alpha", self.declared.get("alpha"))
        if declared is not None:
            return declared, "the adapter's configuration"
        found = next(iter(self._header.items()), None)
        return (None, "") if found is None else (found[1], f"{found[0]} in its header")

    def _declared_rank(self, module: str) -> int | None:
        own = _first_match(self._ranks, module)
        rank = own if own is not None else self.declared.get("r")
        return rank if isinstance(rank, int) and not isinstance(rank, bool) and rank > 0 else None

    def _declared(self, files: WeightFiles) -> dict[str, Any]:
        """PEFT's configuration of the adapter, from its folder or from the file's header."""
        declared = files.declared_config(ADAPTER_CONFIG) if _is_alone(files) else {}
        for name in _CONFIGS:
            found = files.beside.get(name)
            if isinstance(found, str) and found.lstrip().startswith("{"):
                found = json_object(found, f"{self._path}: {name} in its header")
            if isinstance(found, dict):
                own = {str(key).removeprefix(_COMPONENT): value for key, value in found.items()}
                declared = {**declared, **own}
        return declared

    def _patterns(self, field: str) -> list[tuple[re.Pattern[str], Any]]:
        """The compiled patterns of a field, in order: PEFT matches the ends of names, unless a pattern begins by ^."""
        patterns = self.declared.get(field) or {}
        if not isinstance(patterns, Mapping):
            raise CheckpointError(f"{self._path}: declares an {field} that is no JSON object")
        compiled = []
        for key, value in ((str(key), value) for key, value in patterns.items()):
            try:
                if len(key) > _LONGEST_PATTERN:
                    raise re.error(f"longer than {_LONGEST_PATTERN} characters")
                compiled.append((re.compile(rf"(.*\.)?({key})$"), value))
            except (re.error, OverflowError, RecursionError) as error:
                raise CheckpointError(
                    f"{self._path}: {field} has {printable(key)}, which is no regular expression ({error})"
                ) from error
        return compiled


def _first_match(patterns: list[tuple[re.Pattern[str], Any]], module: str) -> Any:
    return next((value for pattern, value in patterns if pattern.match(module)), None)


def _is_alone(files: WeightFiles) -> bool:
    """Whether adapter_config.json in the file's folder can only be this file's."""
    file = files.files[0]
    if files.path.is_dir() or file.name.startswith("adapter_model"):
        return True
    try:
        return sum(other.suffix in (".safetensors", ".bin", ".pt") for other in file.parent.iterdir()) == 1
    except OSError:  # a folder that cannot be listed
        return False


def _number(value: Any) -> float | None:
    """A finite number, which a safetensors header has as text."""
    try:
        number = float(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else math.nan
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None
