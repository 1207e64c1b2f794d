"""The blocks of the causal DiT: their weights, and the functions that compute them for all passes of a stream.

Shapes: B batch, F frames of the pass, s tokens of a frame that this rank owns, T = F·s, D model width, H heads, d head
width, L text tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from causalrope_kernels import Affine, Keys, Modulation, PassOperations, Projection, Rotation, rms_norm
from causalrope_kernels.arguments import Norm
from causalrope_sp.config import DiTConfig
from causalrope_sp.reuse.output_store import OutputOf, computed

Attend = Callable[[int, Projection], Tensor]


class ContextKeys(NamedTuple):
    """What a layer's cross-attention reads: the keys and values of the text, and of the image tokens if there are."""

    text: Keys
    image: Keys | None = None


TextContext = list[ContextKeys]  # one entry per layer


class BlockModulation(NamedTuple):
    """The norms before self-attention and the feed-forward, and the gates, (…, F, D), after them."""

    norm_1: Norm
    gate_1: Tensor
    norm_2: Norm
    gate_2: Tensor


@dataclass(frozen=True)
class PassModulation:
    """What the model computes of the timesteps of a pass, and of nothing else.

    Args:
        blocks_L6FD: shift, factor (one plus the scale) and gate of self-attention, then of the feed-forward, of every
            block, (L, 6, …, F, D), in float32 or wider.
        head_2FD: shift and factor of the head, (2, …, F, D).
        eps: the epsilon of the norms.
    """

    blocks_L6FD: Tensor
    head_2FD: Tensor
    eps: float

    @cached_property
    def blocks(self) -> list[BlockModulation]:
        """Norms and gates block by block."""
        return [self._block(*vectors_6FD.unbind(0)) for vectors_6FD in self.blocks_L6FD.unbind(0)]

    @cached_property
    def head(self) -> Norm:
        """The norm of the head for all frames."""
        return self.norm(*self.head_2FD)

    def last(self, groups: int) -> tuple[BlockModulation, Norm]:
        """Returns what the last block and the head take for the last `groups` timesteps; norm_1 is that of all."""
        vectors_6FD = self.blocks_L6FD[-1][..., -groups:, :]
        block = self._block(*vectors_6FD.unbind(0))._replace(norm_1=self.blocks[-1].norm_1)
        return block, self.norm(*self.head_2FD[..., -groups:, :])

    def _block(self, shift_1: Tensor, factor_1: Tensor, gate_1: Tensor, *last: Tensor) -> BlockModulation:
        shift_2, factor_2, gate_2 = last
        return BlockModulation(self.norm(shift_1, factor_1), gate_1, self.norm(shift_2, factor_2), gate_2)

    def norm(self, shift: Tensor, factor: Tensor) -> Norm:
        """Returns the norm that these vectors, (…, F, D), modulate: with F = 1 all tokens share them."""
        if shift.shape[:-1] == (1,):
            return Affine(factor[0], shift[0], self.eps)
        return Modulation(shift, factor, self.eps)


@dataclass(frozen=True)
class ForwardPass:
    """Describes one forward: the timesteps of its frames, their rotation, and what they attend.

    Args:
        timesteps_F: the timestep of every frame in [0, 1000], (F,), or (B, F) in training, where batch entries differ;
            or of every group of equally many consecutive frames, which are then the F of all that depends on them.
        predicted_frames: how many of the last frames the velocity is computed for.
        rotation: the rotary angles of the tokens.
        text: the keys and values of the text and of image tokens, for every layer.
        attend: takes a layer's number and the projection of its tokens to q, k and v, and returns what the tokens
            attend, (B, T, H, d).
        operations: the operations between the matrix products.
        settled: what `CausalDiT.settled` returns for these operations; None settles them for this pass.
        output: takes a layer's number, the kind of a module ("self", "cross" or "mlp") and a function that computes
            its output. It returns that output, or the stored output of an earlier pass (`reuse`).
        modulation: what `CausalDiT.modulation` returns for these timesteps; None computes it in this pass.
    """

    timesteps_F: Tensor
    predicted_frames: int
    rotation: Rotation
    text: TextContext
    attend: Attend
    operations: PassOperations = field(default_factory=PassOperations.checked)
    settled: SettledModel | None = None
    output: OutputOf = computed
    modulation: PassModulation | None = None

    @property
    def frames(self) -> int:
        """The frames of the pass."""
        return self.rotation.query_times_F.shape[0]


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


BlockForward = Callable[[Residual, BlockModulation, int, ForwardPass, Tensor | None, int | None], Residual]
"""Computes a block, from the residual before it to the residual after it: its modulation, its number, the pass, memory
for the norms, (B, T, D), or None where a gradient is computed, and how many of the last tokens go on after
self-attention, or None for all."""


class SettledModel(NamedTuple):
    """The functions of all blocks, and that of the head's linear layer."""

    blocks: list[BlockForward]
    head: Callable[[Tensor], Tensor]


class SelfAttention(nn.Module):
    """The weights of self-attention, with an RMSNorm of q and k over all of D."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.heads, self.eps = config.num_heads, config.eps
        self.qkv = nn.Linear(config.dim, 3 * config.dim)
        self.norm_q = nn.RMSNorm(config.dim, config.eps)
        self.norm_k = nn.RMSNorm(config.dim, config.eps)
        self.out = nn.Linear(config.dim, config.dim)

    def settled(self, operations: PassOperations) -> Callable[[Tensor, int, ForwardPass, int | None], Tensor]:
        """Returns the function that projects tokens to q, k and v, attends, and projects the result, (B, T, D), of all
        tokens or of so many of the last ones."""
        qkv, out = (linear(module, operations) for module in (self.qkv, self.out))
        q_weight, k_weight, heads, eps = self.norm_q.weight, self.norm_k.weight, self.heads, self.eps

        def attended(x_BTD: Tensor, layer: int, step: ForwardPass, kept: int | None) -> Tensor:
            batch, tokens, _ = x_BTD.shape
            frames = step.frames
            qkv_BFSN = qkv(x_BTD).view(batch, frames, tokens // frames, -1)
            projection = Projection(qkv_BFSN, q_weight, k_weight, step.rotation, heads, eps)
            attended_BTD = step.attend(layer, projection).flatten(2)
            return out(attended_BTD if kept is None else attended_BTD[:, -kept:])

        return attended


class CrossAttention(nn.Module):
    """The weights of attention on the text, with an RMSNorm of q and k over all of D. A model with image tokens attends
    them with the same queries and adds both results."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.heads, self.eps = config.num_heads, config.eps
        self.q = nn.Linear(config.dim, config.dim)
        self.kv = nn.Linear(config.dim, 2 * config.dim)
        self.norm_q = nn.RMSNorm(config.dim, config.eps)
        self.norm_k = nn.RMSNorm(config.dim, config.eps)
        self.out = nn.Linear(config.dim, config.dim)
        if config.image_dim:
            self.kv_image = nn.Linear(config.dim, 2 * config.dim)
            self.norm_k_image = nn.RMSNorm(config.dim, config.eps)

    def keys(self, text_BLD: Tensor, image_BND: Tensor | None = None) -> ContextKeys:
        """Computes the keys and values of the embedded text, (B, L, H, d) each, and of the embedded image tokens."""
        image = None if image_BND is None else self._keys(self.kv_image(image_BND), self.norm_k_image)
        return ContextKeys(self._keys(self.kv(text_BLD), self.norm_k), image)

    def _keys(self, kv_BLE: Tensor, norm: nn.RMSNorm) -> Keys:
        k, v = kv_BLE.chunk(2, -1)
        k = rms_norm(k, norm.weight, self.eps)
        v = v.contiguous()  # not a view, which would keep the unnormed keys
        return Keys(k.unflatten(-1, (self.heads, -1)), v.unflatten(-1, (self.heads, -1)))

    def settled(self, operations: PassOperations) -> Callable[[Tensor, ContextKeys], Tensor]:
        """Returns the function that attends the text's keys and projects the result, (B, T, D)."""
        q, out = (linear(module, operations) for module in (self.q, self.out))
        q_weight, heads, eps, in_place = self.norm_q.weight, self.heads, self.eps, operations.in_place
        rms_norm, attention = operations.settled_rms_norm(), operations.attention

        def attended(x_BTD: Tensor, keys: ContextKeys) -> Tensor:
            q_BTD = q(x_BTD)
            q_BTD = rms_norm(q_BTD, q_weight, eps, q_BTD if in_place else None)
            q_BTHD = q_BTD.view(*q_BTD.shape[:2], heads, -1)
            if keys.image is None:
                return out(attention(q_BTHD, keys.text, reuse_q=in_place).flatten(2))
            of_image = attention(q_BTHD, keys.image, reuse_q=False)
            return out((attention(q_BTHD, keys.text, reuse_q=in_place) + of_image).flatten(2))

        return attended


class FeedForward(nn.Module):
    """The weights of two linear layers with GELU, in its tanh form, between them."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.dim, config.ffn_dim)
        self.down = nn.Linear(config.ffn_dim, config.dim)

    def settled(self, operations: PassOperations) -> Callable[[Tensor], Tensor]:
        """Returns the function that computes the layers, (B, T, D)."""
        up, down = linear(self.up, operations, gelu=True), linear(self.down, operations)
        return lambda x_BTD: down(up(x_BTD))


class Block(nn.Module):
    """The weights of a block of Wan's DiT: self-attention, cross-attention and feed-forward, modulated by time."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.eps = config.eps
        self.modulation = modulation_table(6, config.dim)
        self.self_attn = SelfAttention(config)
        self.cross_norm = nn.LayerNorm(config.dim, config.eps)
        self.cross_attn = CrossAttention(config)
        self.ffn = FeedForward(config)

    def settled(self, operations: PassOperations) -> BlockForward:
        """Returns the function that computes the block by these operations, with all weights looked up."""
        attended, attended_text = self.self_attn.settled(operations), self.cross_attn.settled(operations)
        computed = self.ffn.settled(operations)
        add_norm_1, add_norm_2, add_norm_3 = (operations.settled_add_norm() for _ in range(3))
        cross_norm = Affine(self.cross_norm.weight, self.cross_norm.bias, self.eps)

        def forward(
            residual: Residual,
            modulation: BlockModulation,
            layer: int,
            step: ForwardPass,
            normed: Tensor | None,
            kept: int | None,
        ) -> Residual:
            norm_1, gate_1, norm_2, gate_2 = modulation
            output = step.output
            x, branch, gate = residual
            x, y = add_norm_1(x, branch, gate, norm_1, normed)
            branch = output(layer, "self", partial(attended, y, layer, step, kept))
            if kept is not None:
                x = x[:, -kept:].contiguous()
                normed = None if normed is None else torch.empty_like(x, dtype=normed.dtype)
            x, y = add_norm_2(x, branch, gate_1, cross_norm, normed)
            branch = output(layer, "cross", partial(attended_text, y, step.text[layer]))
            x, y = add_norm_3(x, branch, None, norm_2, normed)
            return Residual(x, output(layer, "mlp", partial(computed, y)), gate_2)

        return forward


def linear(module: nn.Linear, operations: PassOperations, gelu: bool = False) -> Callable[[Tensor], Tensor]:
    """Returns the function that computes a linear layer in the dtype of its weight.

    Args:
        module: the layer.
        operations: the operations of the pass.
        gelu: whether GELU, in its tanh form, follows.
    """
    if type(module) is nn.Linear:
        return operations.settled_linear(module.weight, module.bias, gelu)
    compute, bias = operations.linear_gelu if gelu else operations.linear, module.bias
    return lambda x: compute(x.to(bias.dtype), module.weight, bias)  # a quantized weight is dequantized at every use


def modulation_table(rows: int, dim: int) -> nn.Parameter:
    """The learned part of shifts, scales and gates.

    On the meta device no random numbers are drawn, since torch would import sympy for that: 75 MB and over a second.
    """
    table = torch.empty(rows, dim)
    return nn.Parameter(table if table.is_meta else torch.randn(rows, dim) / dim**0.5)
