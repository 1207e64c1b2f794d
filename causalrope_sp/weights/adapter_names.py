"""The names of tensors in adapter files: which module each one changes, and which part of the change it holds.

A name is a prefix, a module and a role. Trainers differ in all three: they write the module with dots or, as kohya's
do, with underscores, and both over Wan's own names or diffusers'. The loader and `inspect` share these tables.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass

# What stands before the module, and whose files have it. Longer ones come first where one begins another.
PREFIXES = {
    "base_model.model.": "PEFT",
    "transformer.": "diffusers, finetrainers, SimpleTuner, OneTrainer",
    "model.diffusion_model.": "ComfyUI's checkpoints",
    "diffusion_model.": "ComfyUI, diffusion-pipe, ai-toolkit, LightX2V",
    "diffusion.model.": "converted files that ComfyUI-WanVideoWrapper reads",
    "pipe.dit.": "DiffSynth-Studio, UniAnimate-DiT",
    "dit.": "DiffSynth-Studio",
    "unet.": "ai-toolkit",
    "base_model.": "PEFT, a part of its prefix removed",
    "model.": "Self-Forcing's wrapper",
    "generator.": "Self-Forcing's training",
    "net.": "rCM, Cosmos",
    "lora_unet__": "VideoX-Fun",
    "lora_unet_": "kohya's trainers, musubi-tuner",
    "lora_transformer_": "OneTrainer",
    "lycoris_": "LyCORIS, SimpleTuner, ai-toolkit",
}
PEFT = "base_model.model."

_ADAPTER = r"(?:\.[^.]+)?"  # the adapter's name, such as .default, which PEFT writes within a model's own state
# role -> its names after the module
ROLES = {
    "down": rf"(?:lora_A|lora_down|lora\.down)(?:{_ADAPTER}\.weight)?",
    "up": rf"(?:lora_B|lora_up|lora\.up)(?:{_ADAPTER}\.weight)?",
    "mid": r"lora_mid(?:\.weight)?",
    "up_bias": rf"(?:lora_B|lora_up){_ADAPTER}\.bias",
    "magnitude": rf"lora_magnitude_vector{_ADAPTER}(?:\.weight)?",
    "dora_scale": r"dora_scale",
    **{f"hada_{part}": rf"hada_{part}{_ADAPTER}" for part in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    **{f"lokr_{part}": rf"lokr_{part}{_ADAPTER}" for part in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
    "alpha": r"alpha",
    "diff": r"diff|w_norm",  # w_norm and b_norm are LyCORIS's
    "diff_b": r"diff_b|b_norm",
    "diff_m": r"diff_m",
}
_KEY = re.compile(r"(?P<module>.+?)\.(?:" + "|".join(rf"(?P<{role}>{names})" for role, names in ROLES.items()) + ")")
# Adapters that are named and not merged: the end of a key -> the adapter
_UNMERGED = {
    "oft_blocks": "OFT",
    "oft_diag": "OFT",
    "oft_R.weight": "OFT",
    "oft_R": "OFT",
    "boft_R": "BOFT",
    "a1.weight": "GLoRA",
    "b1.weight": "GLoRA",
    "on_input": "IA3",
    "ia3_l": "IA3",
    "vera_lambda_b": "VeRA",
    "hra_u": "HRA",
    "set_weight": "replacement of weights",
    "reshape_weight": "replacement of weights",
}


@dataclass(frozen=True)
class AdapterKey:
    """The parts of a tensor's name in an adapter file.

    Attributes:
        prefix: what stands before the module; "" or one of `PREFIXES`, several of them after each other.
        module: the module in the words of its layout, with dots or underscores.
        role: one of `ROLES`.
        peft_module: the name by which PEFT's patterns call the module.
    """

    prefix: str
    module: str
    role: str
    peft_module: str


def parse_key(name: str) -> AdapterKey | None:
    """Returns the parts of a tensor's name; None if it has no role of an adapter.

    Args:
        name: the name, without the modules that training wraps around others.
    """
    match = _KEY.fullmatch(name)
    if match is None:
        return None
    role = next(role for role in ROLES if match[role] is not None)
    module = match["module"]
    bare = _without_prefix(module)
    prefix = module[: len(module) - len(bare)]
    # PEFT's patterns match names within the model that it wrapped, whose own prefixes are part of them
    peft_module = module.removeprefix(PEFT) if module.startswith(PEFT) else bare
    return AdapterKey(prefix, bare, role, peft_module)


def writers(prefix: str) -> str:
    """Returns whose files have a prefix, as text."""
    first = next((known for known in PREFIXES if prefix.startswith(known)), None)
    return "no prefix: Wan's or diffusers' own names" if first is None else f"{prefix} ({PREFIXES[first]})"


def is_adapter(names: Collection[str], markers: Iterable[str]) -> bool:
    """Returns whether a file is an adapter: a name has a role of one, and the weights of no whole model are there.

    Args:
        names: the names of all tensors, without the modules that training wraps around others.
        markers: a module of a block that every whole model has, for each layout.
    """
    whole = re.compile(rf"(?:.*\.)?blocks\.\d+\.(?:{'|'.join(map(re.escape, markers))})\.\w+(?:\.\d+)?\.weight")
    adapts = any(parse_key(name) or unmerged_kind(name) for name in names)
    return adapts and not any(whole.fullmatch(name) and parse_key(name) is None for name in names)


def unmerged_kind(name: str) -> str | None:
    """Returns the kind of adapter that a tensor's name shows and that is not merged; None for any other name."""
    return next((kind for end, kind in _UNMERGED.items() if name == end or name.endswith(f".{end}")), None)


def flat(module: str) -> str:
    """Returns a module's name in one spelling: kohya's trainers write underscores for dots, musubi-tuner's mix both."""
    return module.replace(".", "_")


def _without_prefix(module: str) -> str:
    """Returns a module's name without the prefixes that trainers add."""
    while (prefix := next((known for known in PREFIXES if module.startswith(known)), None)) and module != prefix:
        module = module.removeprefix(prefix)
    return module
