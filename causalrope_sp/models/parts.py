"""The parts that the blocks of all DiTs here have in common, and the function of a block that is made of them.

A block is a sequence of modules, such as attention, attention on the text and a feed-forward. Each reads the residual,
mostly through a norm that the timestep modulates, and its output is added to the residual, mostly times a gate.

Shapes: B batch, F frames of the pass, T tokens of the pass on this rank, frame after frame, D model width, H heads, d
head width, L text tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from causalrope_kernels import Keys, PassOperations
from causalrope_kernels.arguments import Norm
from causalrope_kernels.fp8_linear import settled_fp8_linear
from causalrope_sp.models.fp8_linear import Fp8Linear
from causalrope_sp.models.modulation import BlockModulation
from causalrope_sp.reuse.output_store import gated
from causalrope_sp.reuse.policy import Kind


class Residual(NamedTuple):
    """The residual between two blocks as a sum that is not computed yet: x + branch·gate.

    The next norm computes the sum as it reads it, so that both take one pass over memory.

    Args:
        x_BTD: the residual before the last module.
        branch_BTD: the output of the last module, or None for nothing to add.
        gate: the factor of the output by frame, (F, D) or (B, F, D), or None for 1.
    """

    x_BTD: Tensor
    branch_BTD: Tensor | None = None
    gate: Tensor | None = None

    def sum(self) -> Tensor:
        """Computes the sum, in the dtype of x."""
        x, branch, gate = self
        if branch is None:
            return x
        return (x + (branch if gate is None else gated(branch, gate))).to(x.dtype)


Compute = Callable[[Tensor, int, Any, int | None], Tensor]
"""Computes a module's output, (B, T, D), from what it reads: the layer's number, the pass, and how many of the last
tokens the output is needed for, or None for all."""

Enter = Callable[[Tensor, Tensor | None, Tensor | None, BlockModulation, Tensor | None], tuple[Tensor, Tensor]]
"""Adds the last module's output times its gate to the residual, and returns the sum and what the next module reads of
it: the residual, output, gate, the block's modulation, and memory for norms or None."""

BlockForward = Callable[[Residual, BlockModulation, int, Any, Tensor | None, int | None], Residual]
"""Computes a block, from the residual before it to the residual after it: its modulation, its number, the pass, memory
for the norms, (B, T, D), or None where a gradient is computed, and how many of the last tokens go on after the first
module, or None for all."""


class SettledModel(NamedTuple):
    """The functions of all blocks, and that of the head's linear layer."""

    blocks: list[BlockForward]
    head: Callable[[Tensor], Tensor]


class BlockModule(NamedTuple):
    """One module of a block.

    Args:
        kind: the kind of its output, for reuse.
        enter: adds what is before it and makes what it reads.
        compute: computes its output.
        gate: returns the gate of its output, (F, D), or None for 1.
    """

    kind: Kind
    enter: Enter
    compute: Compute
    gate: Callable[[BlockModulation], Tensor | None]


def settled_block(modules: Sequence[BlockModule]) -> BlockForward:
    """Returns the function that computes a block of these modules."""

    def forward(
        residual: Residual,
        modulation: BlockModulation,
        layer: int,
        step: Any,
        normed: Tensor | None,
        kept: int | None,
    ) -> Residual:
        x, branch, gate = residual
        for kind, enter, compute, gate_of in modules:
            x, y = enter(x, branch, gate, modulation, normed)
            branch, gate = step.output(layer, kind, partial(compute, y, layer, step, kept), gate_of(modulation))
            if kept is not None:  # the first module has read all tokens
                x, kept = x[:, -kept:].contiguous(), None
                normed = None if normed is None else torch.empty_like(x, dtype=normed.dtype)
        return Residual(x, branch, gate)

    return forward


def attention_module(kind: Kind, operations: PassOperations, compute: Compute) -> BlockModule:
    """Describes the self-attention of a block, with the first norm and gate of the block's modulation."""
    return BlockModule(kind, _normed(operations, lambda m: m.norm_1), compute, lambda m: m.gate_1)


def feed_forward_module(kind: Kind, operations: PassOperations, feed_forward: FeedForward) -> BlockModule:
    """Describes the feed-forward of a block, with the second norm and gate of the block's modulation."""
    computed = feed_forward.settled(operations)
    enter = _normed(operations, lambda m: m.norm_2)
    return BlockModule(kind, enter, lambda y, layer, step, kept: computed(y), lambda m: m.gate_2)


def text_module(
    kind: Kind,
    operations: PassOperations,
    attention: TextAttention,
    norm: Norm | None = None,
    keys_of: Callable[[Any], Sequence[Any]] = lambda step: step.text,
) -> BlockModule:
    """Describes the attention on the text: without a gate, and with a norm that no timestep modulates, or none.

    Args:
        kind: the kind of its output.
        operations: the operations of the pass.
        attention: the weights.
        norm: the norm of what it reads, or None for none.
        keys_of: returns the text's keys of every layer for a pass.
    """
    attended = attention.settled(operations)
    enter = _added if norm is None else _normed(operations, lambda m: norm)
    return BlockModule(kind, enter, lambda y, layer, step, kept: attended(y, keys_of(step)[layer]), lambda m: None)


def _normed(operations: PassOperations, norm_of: Callable[[BlockModulation], Norm]) -> Enter:
    """Returns the function that adds and makes a norm of the sum."""
    add_norm = operations.settled_add_norm()
    return lambda x, branch, gate, modulation, memory: add_norm(x, branch, gate, norm_of(modulation), memory)


def _added(
    x: Tensor, branch: Tensor | None, gate: Tensor | None, modulation: BlockModulation, memory: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Adds, and returns the sum twice."""
    x = Residual(x, branch, gate).sum()
    return x, x


class TextAttention(nn.Module):
    """The weights of attention on the text.

    Args:
        dim: D.
        heads: H.
        bias: whether the projections to queries, keys and values have a bias.
    """

    def __init__(self, dim: int, heads: int, bias: bool = True) -> None:
        super().__init__()
        self.heads, self.width = heads, dim // heads
        self.q = nn.Linear(dim, dim, bias)
        self.kv = nn.Linear(dim, 2 * dim, bias)
        self.out = nn.Linear(dim, dim)

    def keys(self, text_BLD: Tensor) -> Any:
        """Computes what the function of `settled` attends: keys and values of the embedded text, (B, L, H, d) each."""
        k, v = self.kv(text_BLD).chunk(2, -1)
        return Keys(k.unflatten(-1, (self.heads, -1)), v.unflatten(-1, (self.heads, -1)))

    def settled_queries(self, operations: PassOperations) -> Callable[[Tensor], Tensor]:
        """Returns the function that projects tokens to queries, (B, T, D), as they attend."""
        return linear(self.q, operations)

    def settled(self, operations: PassOperations) -> Callable[[Tensor, Any], Tensor]:
        """Returns the function that attends the text's keys and projects the result, (B, T, D)."""
        queries, out, heads = self.settled_queries(operations), linear(self.out, operations), self.heads
        width, attention, in_place = self.width, self.settled_attention(operations), operations.in_place

        def attended(x_BTD: Tensor, keys: Any) -> Tensor:
            q_BTD = queries(x_BTD)
            q_BTHD = q_BTD.view(*q_BTD.shape[:2], heads, width)
            return out(attention(q_BTHD, keys, reuse_q=in_place).flatten(2))

        return attended

    def settled_attention(self, operations: PassOperations) -> Callable[..., Tensor]:
        """Returns the function of queries and the text's keys."""
        return operations.attention


class FeedForward(nn.Module):
    """The weights of two linear layers with GELU, in its tanh form, between them.

    Args:
        dim: D.
        hidden: the numbers between the two layers.
    """

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(dim, hidden)
        self.down = nn.Linear(hidden, dim)

    def settled(self, operations: PassOperations) -> Callable[[Tensor], Tensor]:
        """Returns the function that computes the layers, (B, T, D)."""
        up, down = linear(self.up, operations, gelu=True), linear(self.down, operations)
        return lambda x_BTD: down(up(x_BTD))


def linear(module: nn.Linear | Fp8Linear, operations: PassOperations, gelu: bool = False) -> Callable[[Tensor], Tensor]:
    """Returns the function that computes a linear layer in the dtype of its weight.

    Args:
        module: the layer.
        operations: the operations of the pass.
        gelu: whether GELU, in its tanh form, follows.
    """
    if type(module) is nn.Linear:
        return operations.settled_linear(module.weight, module.bias, gelu)
    if isinstance(module, Fp8Linear) and module.dynamic:
        return settled_fp8_linear(module.numbers, module.scale, module.bias, gelu)
    compute, bias = operations.linear_gelu if gelu else operations.linear, module.bias
    return lambda x: compute(x.to(bias.dtype), module.weight, bias)  # a quantized weight is dequantized at every use
