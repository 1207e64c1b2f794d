"""Wrappings that training code leaves around a model's tensors, and their removal.

There are three kinds, in any nesting: dictionaries around the tensors (`generator_ema`, `model`), names of modules that
wrap others inside a tensor's name (`blocks.0._fsdp_wrapped_module.self_attn`), and a prefix before the key layout's own
names (`model.`, `net.`, or another name that a trainer chose).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from causalrope_sp.errors import CheckpointError, printable
from causalrope_sp.weights.messages import some

# Training scripts save the averaged and the raw weights; the averaged ones are meant for use.
PARTS = ("generator_ema", "generator", "state_dict", "model", "module", "net", "transformer")
LORA_PARTS = ("generator_lora", "lora", *PARTS)
# Other networks of the same training run, which are never the model that is asked for.
AUXILIARY_PARTS = (
    *("critic", "critic_lora", "discriminator", "fake_score", "real_score", "text_encoder", "text_encoders", "vae"),
    *("cond_stage_model", "conditioner", "first_stage_model", "clip_vision", "image_encoder"),
)
WRAPPERS = ("_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod", "_forward_module", "module")
DEEPEST = 8  # nested dictionaries; a pickle can hold one that contains itself


@dataclass(frozen=True)
class Wrapping:
    """What training code left around a model's tensors.

    Attributes:
        parts: the keys of the dictionaries that were opened, outermost first.
        prefix: what stands before every name, "" or ending in a dot.
        modules: the names of modules that wrap others.
        auxiliary: other parts of the file, which were not used.
    """

    parts: tuple[str, ...] = ()
    prefix: str = ""
    modules: tuple[str, ...] = ()
    auxiliary: tuple[str, ...] = ()

    def __str__(self) -> str:
        found = [f"under {' > '.join(map(printable, self.parts))}"] if self.parts else []
        found += [f"prefix {printable(self.prefix)}"] if self.prefix else []
        found += [f"within names {', '.join(self.modules)}"] if self.modules else []
        found += [f"unused parts {some(self.auxiliary)}"] if self.auxiliary else []
        return "; ".join(found) or "none"


@dataclass(frozen=True)
class Nested:
    """The innermost dictionary of a file.

    Attributes:
        content: what it holds.
        parts: the keys that led to it, outermost first.
        auxiliary: the keys of dictionaries next to those, which were not opened.
        beside: the numbers, texts and dictionaries of such that lie next to those, by key.
        passed_by: the keys within `content` whose values are no tensors.
    """

    content: Any
    parts: tuple[str, ...]
    auxiliary: tuple[str, ...]
    beside: Mapping[str, Any]
    passed_by: tuple[str, ...] = ()


def innermost(content: Any, wanted: str | None, parts: Sequence[str]) -> Nested:
    """Opens nested dictionaries: at each level that of `wanted` where there is one, else of the first of `parts`.

    Args:
        content: what the file holds.
        wanted: the key that the caller asks for.
        parts: the keys to try, the preferred first.

    Returns:
        The innermost dictionary, at most `DEEPEST` levels down.
    """
    taken: list[str] = []
    auxiliary: list[str] = []
    beside: dict[str, Any] = {}
    while isinstance(content, dict) and len(taken) < DEEPEST:
        inner = [key for key, value in content.items() if isinstance(key, str) and isinstance(value, dict) and value]
        key = wanted if wanted in inner else next((part for part in parts if part in inner), None)
        holding = [other for other, value in content.items() if not is_setting(value)]
        if key is None and len(holding) == 1 and holding[0] in inner and holding[0] not in AUXILIARY_PARTS:
            key = holding[0]  # another name, which a trainer chose
        if key is None:
            break
        taken.append(key)
        auxiliary += [other for other in inner if other != key]
        beside |= {str(other): value for other, value in content.items() if is_setting(value)}
        content = content[key]
    return Nested(content, tuple(taken), tuple(auxiliary), beside)


def is_setting(value: Any, deep: int = 3) -> bool:
    """Returns whether a value is a number, a text, bytes, or a list or dictionary of such, and holds no tensors."""
    if isinstance(value, dict | list | tuple):
        inner = value.values() if isinstance(value, dict) else value
        return deep > 0 and len(value) < 1000 and all(is_setting(each, deep - 1) for each in inner)
    return value is None or isinstance(value, str | bytes | int | float)


def bare_names(names: Iterable[str], where: object) -> dict[str, str]:
    """Removes the modules that wrap others from names.

    Args:
        names: stored names.
        where: the checkpoint, for messages.

    Returns:
        Bare name -> stored name.

    Raises:
        CheckpointError: two stored names have the same bare name.
    """
    bare: dict[str, str] = {}
    for name in names:
        short = ".".join(word for word in name.split(".") if word not in WRAPPERS)
        if short in bare:
            raise CheckpointError(f"{where}: {printable(bare[short])} and {printable(name)} are the same tensor twice")
        bare[short] = name
    return bare


def wrapping_modules(names: Iterable[str]) -> tuple[str, ...]:
    """Returns those of WRAPPERS that occur in any name."""
    found = {word for name in names for word in name.split(".")}
    return tuple(word for word in WRAPPERS if word in found)


def choose_prefix(prefixes: Sequence[str], wanted: str | None, where: object) -> str:
    """Chooses the model's prefix: the one under `wanted`, else the first in the order of PARTS, else the only one.

    Args:
        prefixes: the prefixes under which names of the layout occur; not empty.
        wanted: the part that the caller asks for.
        where: the checkpoint, for messages.

    Returns:
        The prefix.

    Raises:
        CheckpointError: several prefixes remain.
    """

    def first(prefix: str) -> str:
        return prefix.split(".")[0]

    if wanted is not None:
        prefixes = [p for p in prefixes if wanted in p.split(".")] or prefixes
    if len(prefixes) > 1:
        prefixes = [p for p in prefixes if first(p) not in AUXILIARY_PARTS] or prefixes
    if len(prefixes) > 1:
        best = min(PARTS.index(first(p)) if first(p) in PARTS else len(PARTS) for p in prefixes)
        prefixes = [p for p in prefixes if (PARTS.index(first(p)) if first(p) in PARTS else len(PARTS)) == best]
    if len(prefixes) > 1:
        raise CheckpointError(f"{where}: holds several models, under {some(prefixes)}; say which one as `part`")
    return prefixes[0]
