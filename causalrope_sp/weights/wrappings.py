"""What training code leaves around a model's tensors, and how it is taken off.

Three kinds, in any nesting: dictionaries on top (`generator_ema`, `model`, ...), the names of modules that wrap others
anywhere in a tensor's name (`blocks.0._fsdp_wrapped_module.self_attn...`), and what is left before a layout's own names
(`model.`, `net.`, or whatever else a trainer called the thing that it trained).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from causalrope_sp.errors import CheckpointError
from causalrope_sp.weights.messages import shown, some

# Training scripts keep the averaged and the raw weights side by side; the averaged ones are meant for use.
PARTS = ("generator_ema", "generator", "state_dict", "model", "module", "net", "transformer")
LORA_PARTS = ("generator_lora", "lora", *PARTS)
# Other networks of the same training run: never what is asked for.
BESIDE = ("critic", "critic_lora", "discriminator", "fake_score", "real_score", "text_encoder", "vae")
WRAPPERS = ("_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod", "_forward_module", "module")
DEEPEST = 8  # dictionaries in one another; a pickle can hold one that holds itself


@dataclass(frozen=True)
class Wrapping:
    """What stood around a model. `parts` are the dictionaries gone into, outermost first; `prefix` is what stands
    before every name; `modules` wrap others within names; `beside` are parts that were passed by."""

    parts: tuple[str, ...] = ()
    prefix: str = ""
    modules: tuple[str, ...] = ()
    auxiliary: tuple[str, ...] = ()

    def __str__(self) -> str:
        said = [f"under {' > '.join(map(shown, self.parts))}"] if self.parts else []
        said += [f"prefix {shown(self.prefix)}"] if self.prefix else []
        said += [f"within names {', '.join(self.modules)}"] if self.modules else []
        said += [f"passed by {some(self.auxiliary)}"] if self.auxiliary else []
        return "; ".join(said) or "none"


@dataclass(frozen=True)
class Nested:
    """The innermost dictionary of a file, the keys that led to it, and those passed by."""

    content: Any
    parts: tuple[str, ...]
    auxiliary: tuple[str, ...]


def innermost(content: Any, wanted: str | None, parts: Sequence[str]) -> Nested:
    """Goes into the dictionaries on top of a file: into `wanted` where there is one, else the first of `parts`."""
    taken: list[str] = []
    auxiliary: list[str] = []
    while isinstance(content, dict) and len(taken) < DEEPEST:
        inner = [key for key, value in content.items() if isinstance(key, str) and isinstance(value, dict) and value]
        key = wanted if wanted in inner else next((part for part in parts if part in inner), None)
        if key is None:
            break
        taken.append(key)
        auxiliary += [other for other in inner if other != key]
        content = content[key]
    return Nested(content, tuple(taken), tuple(auxiliary))


def bare_names(names: Iterable[str], where: object) -> dict[str, str]:
    """Names without the modules that wrap others, each with the name that it is stored under.

    Raises:
        CheckpointError: two stored names become one.
    """
    bare: dict[str, str] = {}
    for name in names:
        short = ".".join(word for word in name.split(".") if word not in WRAPPERS)
        if short in bare:
            raise CheckpointError(f"{where}: {shown(bare[short])} and {shown(name)} are the same tensor twice")
        bare[short] = name
    return bare


def wrapping_modules(names: Iterable[str]) -> tuple[str, ...]:
    found = {word for name in names for word in name.split(".")}
    return tuple(word for word in WRAPPERS if word in found)


def choose_prefix(prefixes: Sequence[str], wanted: str | None, where: object) -> str:
    """Which of the prefixes is the model: the one under `wanted`, else the first of PARTS, else the only one.

    Raises:
        CheckpointError: nothing tells them apart.
    """

    def first(prefix: str) -> str:
        return prefix.split(".")[0]

    if wanted is not None:
        prefixes = [p for p in prefixes if wanted in p.split(".")] or prefixes
    if len(prefixes) > 1:
        prefixes = [p for p in prefixes if first(p) not in BESIDE] or prefixes
    if len(prefixes) > 1:
        best = min(PARTS.index(first(p)) if first(p) in PARTS else len(PARTS) for p in prefixes)
        prefixes = [p for p in prefixes if (PARTS.index(first(p)) if first(p) in PARTS else len(PARTS)) == best]
    if len(prefixes) > 1:
        raise CheckpointError(f"{where}: holds several models, under {some(prefixes)}; say which one as `part`")
    return prefixes[0]


def without(prefix: str, names: Mapping[str, str], others: Iterable[str]) -> tuple[dict[str, str], list[str]]:
    """The names under the prefix, without it, with their stored names; and the stored names of what belongs to no
    model of the file."""
    others = [other for other in others if other and other != prefix]
    words = {*BESIDE, *(other.split(".")[0] for other in others)}
    undo = (*others, *(f"{word}." for word in words if not prefix.startswith(f"{word}.")))
    names = {short: name for short, name in names.items() if not short.startswith(undo)}
    mine = {short.removeprefix(prefix): name for short, name in names.items() if short.startswith(prefix)}
    return mine, [name for short, name in names.items() if not short.startswith(prefix)]
