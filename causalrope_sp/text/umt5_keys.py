"""The key layouts of a UMT5 encoder: transformers', as in a diffusers folder, Wan's own, and llama.cpp's.

The tensors are the same in all: projections are stored output × input, the relative positions' bias bucket × head.
The output of Wan's `gate.0` goes through GELU (`wi_0`) and multiplies that of `fc1` (`wi_1`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

# parameter of transformers' model -> its stored name, or several names of which one is enough
Names = Mapping[str, tuple[str, ...]]

BLOCK = "encoder.block"
ATTENTION, FEED_FORWARD = "layer.0.SelfAttention", "layer.1.DenseReluDense"
_BLOCK_PARAMETERS = (
    "layer.0.layer_norm.weight",
    *(f"{ATTENTION}.{part}.weight" for part in ("q", "k", "v", "o", "relative_attention_bias")),
    "layer.1.layer_norm.weight",
    *(f"{FEED_FORWARD}.{part}.weight" for part in ("wi_0", "wi_1", "wo")),
)


@dataclass(frozen=True)
class T5Layout:
    """The names that a kind of checkpoint uses for the tensors of a UMT5 encoder.

    Attributes:
        name: "wan", "transformers" or "llama.cpp".
        blocks: what stands before the number of a block.
        marker: a module that every block has in this layout and in no other.
        outer: the parameters outside the blocks.
        block: the parameters of a block.
        unneeded: the first parts of names that belong to the rest of a model which has more than an encoder.
    """

    name: str
    blocks: str
    marker: str
    outer: Names
    block: Names
    unneeded: tuple[str, ...] = ()

    def prefix_in(self, names: Iterable[str]) -> str | None:
        """Returns the prefix before names of this layout, "" or ending in a dot; None if `names` has another layout.

        Args:
            names: the names of all tensors of a checkpoint.
        """
        pattern = re.compile(rf"((?:.*\.)?){re.escape(self.blocks)}\.\d+\.{re.escape(self.marker)}\.")
        found = (match for name in names if (match := pattern.match(name)))
        first = next(found, None)
        return None if first is None else first[1]

    def count_blocks(self, names: Iterable[str], prefix: str) -> int:
        """Returns the highest block number plus 1; a gap counts, so that its keys are reported as missing."""
        pattern = re.compile(re.escape(f"{prefix}{self.blocks}.") + r"(\d{1,6})\.")
        return 1 + max(int(match[1]) for name in names if (match := pattern.match(name)))

    def names(self, num_layers: int) -> dict[str, tuple[str, ...]]:
        """Returns every parameter of an encoder with `num_layers` blocks, with its stored names."""
        every = dict(self.outer)
        for n in range(num_layers):
            for parameter, stored in self.block.items():
                every[f"{BLOCK}.{n}.{parameter}"] = tuple(f"{self.blocks}.{n}.{s}" for s in stored)
        return every


TRANSFORMERS = T5Layout(
    name="transformers",
    blocks=BLOCK,
    marker=ATTENTION,
    outer={
        # one table under two names; a file holds one of them or both
        "shared.weight": ("shared.weight", "encoder.embed_tokens.weight"),
        "encoder.final_layer_norm.weight": ("encoder.final_layer_norm.weight",),
    },
    block={name: (name,) for name in _BLOCK_PARAMETERS},
    unneeded=("decoder.", "lm_head."),
)

WAN = T5Layout(
    name="wan",
    blocks="blocks",
    marker="attn",
    outer={
        "shared.weight": ("token_embedding.weight",),
        "encoder.final_layer_norm.weight": ("norm.weight",),
    },
    block={
        "layer.0.layer_norm.weight": ("norm1.weight",),
        f"{ATTENTION}.q.weight": ("attn.q.weight",),
        f"{ATTENTION}.k.weight": ("attn.k.weight",),
        f"{ATTENTION}.v.weight": ("attn.v.weight",),
        f"{ATTENTION}.o.weight": ("attn.o.weight",),
        f"{ATTENTION}.relative_attention_bias.weight": ("pos_embedding.embedding.weight",),
        "layer.1.layer_norm.weight": ("norm2.weight",),
        f"{FEED_FORWARD}.wi_0.weight": ("ffn.gate.0.weight",),
        f"{FEED_FORWARD}.wi_1.weight": ("ffn.fc1.weight",),
        f"{FEED_FORWARD}.wo.weight": ("ffn.fc2.weight",),
    },
)

LLAMA_CPP = T5Layout(  # of encoders in GGUF
    name="llama.cpp",
    blocks="enc.blk",
    marker="attn_q",
    outer={
        "shared.weight": ("token_embd.weight",),
        "encoder.final_layer_norm.weight": ("enc.output_norm.weight",),
    },
    block={
        "layer.0.layer_norm.weight": ("attn_norm.weight",),
        **{f"{ATTENTION}.{part}.weight": (f"attn_{part}.weight",) for part in ("q", "k", "v", "o")},
        f"{ATTENTION}.relative_attention_bias.weight": ("attn_rel_b.weight",),
        "layer.1.layer_norm.weight": ("ffn_norm.weight",),
        f"{FEED_FORWARD}.wi_0.weight": ("ffn_gate.weight",),
        f"{FEED_FORWARD}.wi_1.weight": ("ffn_up.weight",),
        f"{FEED_FORWARD}.wo.weight": ("ffn_down.weight",),
    },
)

LAYOUTS = (WAN, TRANSFORMERS, LLAMA_CPP)
