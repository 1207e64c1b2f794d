"""Which tensors of a file belong to which network: one rule for transformer, text encoder and codec.

A network's names stand under a prefix, "" where a file holds one network. A file with several, such as ComfyUI's
all-in-one checkpoints (`model.diffusion_model.`, `text_encoders.umt5xxl.transformer.`, `vae.`), is read once for each.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from causalrope_sp.weights.wrappings import AUXILIARY_PARTS

# What every network of a kind has behind its prefix, in one layout or another
MARKS = {
    "transformer": r"blocks\.\d+\.(?:self_attn|attn1)\.",
    "text encoder": r"(?:encoder\.block\.\d+\.layer\.0\.SelfAttention|blocks\.\d+\.attn|enc\.blk\.\d+\.attn_q)\.",
    "codec": r"decoder\.(?:mid_block\.resnets\.0\.norm1\.gamma|middle\.0\.residual\.0\.gamma|3\.conv\.0\.weight)$",
}


@dataclass(frozen=True)
class Network:
    """The tensors of one network of a file.

    Attributes:
        own: its name without the prefix -> the stored name.
        rest: the stored names that belong to no network of the file.
        others: the prefixes of other networks.
    """

    own: dict[str, str]
    rest: list[str]
    others: tuple[str, ...]


def prefixes_of(kind: str, names: Collection[str]) -> list[str]:
    """Returns the prefixes under which networks of a kind occur, sorted, each "" or ending in a dot.

    Args:
        kind: one of `MARKS`.
        names: the names of all tensors, without the modules that training wraps around others.
    """
    pattern = re.compile(rf"((?:.*\.)?){MARKS[kind]}")
    return sorted({match[1] for name in names if (match := pattern.match(name))})


def network(prefix: str, names: Mapping[str, str]) -> Network:
    """Selects the tensors of one network and removes its prefix.

    Args:
        prefix: the network's prefix.
        names: bare name -> stored name, of all tensors of the file.
    """
    found = {other for kind in MARKS for other in prefixes_of(kind, names)} - {prefix}
    words = {*AUXILIARY_PARTS, *(other.split(".")[0] for other in found if other)}
    foreign = (f"{word}." for word in words if not prefix.startswith(f"{word}."))
    dropped = (*(other for other in found if other), *foreign)
    left = {short: name for short, name in names.items() if not _is_under(short, prefix, dropped)}
    own = {short.removeprefix(prefix): name for short, name in left.items() if short.startswith(prefix)}
    rest = [] if "" in found else [name for short, name in left.items() if not short.startswith(prefix)]
    return Network(own, rest, tuple(sorted(found)))


def _is_under(name: str, prefix: str, dropped: tuple[str, ...]) -> bool:
    """Whether a name stands under the prefix of another network, and not under a longer one of its own."""
    longest = max((other for other in dropped if name.startswith(other)), key=len, default="")
    return bool(longest) and not (name.startswith(prefix) and len(prefix) > len(longest))
