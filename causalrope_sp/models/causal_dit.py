"""The causal DiT: Wan 2.1's text-to-video transformer over the tokens of one pass.

The model receives one object that describes the pass and knows nothing of ranks: self-attention calls
`ForwardPass.attend`, which the caller binds to a cache and an attention strategy.

Shapes: B batch, F frames of the pass, s tokens of a frame that this rank owns, T = F·s, E numbers in a token,
D model width, H heads, d head width, L text tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from causalrope_kernels import Affine, Keys, Modulation, PassOperations, Projection, Rotation, rms_norm
from causalrope_kernels.reference import wide
from causalrope_sp.config import DiTConfig
from causalrope_sp.reuse.output_store import OutputOf, computed

Attend = Callable[[int, Projection], Tensor]
TextContext = list[Keys]  # the keys and values of the text, one entry per layer's cross-attention


@dataclass(frozen=True)
class ForwardPass:
    """Describes one forward: the timesteps of its frames, their rotation, and what they attend.

    Args:
        timesteps_F: the timestep of every frame in [0, 1000], (F,), or (B, F) in training, where batch entries differ.
        predicted_frames: how many of the last frames the velocity is computed for.
        rotation: the rotary angles of the tokens.
        text: the keys and values of the text, for every layer.
        attend: takes a layer's number and the projection of its tokens to q, k and v, and returns what the tokens
            attend, (B, T, H, d).
        operations: the operations between the matrix products.
        blocks: the blocks as `CausalDiT.settled` returns them for these operations; None settles them for this pass.
        output: takes a layer's number, the kind of a module ("self", "cross" or "mlp") and a function that computes
            its output. It returns that output, or the stored output of an earlier pass (`reuse`).
    """

    timesteps_F: Tensor
    predicted_frames: int
    rotation: Rotation
    text: TextContext
    attend: Attend
    operations: PassOperations = field(default_factory=PassOperations.checked)
    blocks: Sequence[BlockForward] | None = None
    output: OutputOf = computed


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

    def last(self, tokens: int, frames: int) -> Residual:
        """Returns the residual of the last `frames` frames, which have `tokens` tokens in all."""
        branch = None if self.branch_BTD is None else self.branch_BTD[:, -tokens:]
        gate = None if self.gate is None else self.gate[..., -frames:, :]
        return Residual(self.x_BTD[:, -tokens:], branch, gate)


BlockForward = Callable[[Residual, Tensor, int, ForwardPass, Tensor | None], Residual]
"""Computes a block: from the residual before it, its shifts, factors and gates, (6, …, F, D), its number, the pass, and
memory for the norms, (B, T, D), or None where a gradient is computed, to the residual after it."""


class SelfAttention(nn.Module):
    """The weights of self-attention, with an RMSNorm of q and k over all of D."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.heads, self.eps = config.num_heads, config.eps
        self.qkv = nn.Linear(config.dim, 3 * config.dim)
        self.norm_q = nn.RMSNorm(config.dim, config.eps)
        self.norm_k = nn.RMSNorm(config.dim, config.eps)
        self.out = nn.Linear(config.dim, config.dim)

    def settled(self, operations: PassOperations) -> Callable[[Tensor, int, ForwardPass], Tensor]:
        """Returns the function that projects tokens to q, k and v, attends, and projects the result, (B, T, D)."""
        qkv, out = (linear(module, operations) for module in (self.qkv, self.out))
        q_weight, k_weight, heads, eps = self.norm_q.weight, self.norm_k.weight, self.heads, self.eps

        def attended(x_BTD: Tensor, layer: int, step: ForwardPass) -> Tensor:
            batch, tokens, _ = x_BTD.shape
            frames = step.timesteps_F.shape[-1]
            qkv_BFSN = qkv(x_BTD).view(batch, frames, tokens // frames, -1)
            projection = Projection(qkv_BFSN, q_weight, k_weight, step.rotation, heads, eps)
            return out(step.attend(layer, projection).flatten(2))

        return attended


class CrossAttention(nn.Module):
    """The weights of attention on the text, with an RMSNorm of q and k over all of D."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.heads, self.eps = config.num_heads, config.eps
        self.q = nn.Linear(config.dim, config.dim)
        self.kv = nn.Linear(config.dim, 2 * config.dim)
        self.norm_q = nn.RMSNorm(config.dim, config.eps)
        self.norm_k = nn.RMSNorm(config.dim, config.eps)
        self.out = nn.Linear(config.dim, config.dim)

    def keys(self, text_BLD: Tensor) -> Keys:
        """Computes the keys and values of the embedded text, (B, L, H, d) each."""
        k, v = self.kv(text_BLD).chunk(2, -1)
        k = rms_norm(k, self.norm_k.weight, self.eps)
        return Keys(k.unflatten(-1, (self.heads, -1)), v.unflatten(-1, (self.heads, -1)))

    def settled(self, operations: PassOperations) -> Callable[[Tensor, Keys], Tensor]:
        """Returns the function that attends the text's keys and projects the result, (B, T, D)."""
        q, out = (linear(module, operations) for module in (self.q, self.out))
        q_weight, heads, eps, in_place = self.norm_q.weight, self.heads, self.eps, operations.in_place
        rms_norm, attention = operations.rms_norm, operations.attention

        def attended(x_BTD: Tensor, keys: Keys) -> Tensor:
            q_BTD = q(x_BTD)
            q_BTD = rms_norm(q_BTD, q_weight, eps, q_BTD if in_place else None)
            q_BTHD = q_BTD.view(*q_BTD.shape[:2], heads, -1)
            return out(attention(q_BTHD, keys, reuse_q=in_place).flatten(2))

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
        self.modulation = _table(6, config.dim)
        self.self_attn = SelfAttention(config)
        self.cross_norm = nn.LayerNorm(config.dim, config.eps)
        self.cross_attn = CrossAttention(config)
        self.ffn = FeedForward(config)

    def settled(self, operations: PassOperations) -> BlockForward:
        """Returns the function that computes the block by these operations, with all weights looked up."""
        attended, attended_text = self.self_attn.settled(operations), self.cross_attn.settled(operations)
        computed = self.ffn.settled(operations)
        add_norm, eps = operations.add_norm, self.eps
        cross_norm = Affine(self.cross_norm.weight, self.cross_norm.bias, eps)

        def forward(
            residual: Residual, modulation_6FD: Tensor, layer: int, step: ForwardPass, normed: Tensor | None
        ) -> Residual:
            shift_1, factor_1, gate_1, shift_2, factor_2, gate_2 = modulation_6FD.unbind(0)
            output = step.output
            x, branch, gate = residual
            x, y = add_norm(x, branch, gate, Modulation(shift_1, factor_1, eps), normed)
            branch = output(layer, "self", partial(attended, y, layer, step))
            x, y = add_norm(x, branch, gate_1, cross_norm, normed)
            branch = output(layer, "cross", partial(attended_text, y, step.text[layer]))
            x, y = add_norm(x, branch, None, Modulation(shift_2, factor_2, eps), normed)
            return Residual(x, output(layer, "mlp", partial(computed, y)), gate_2)

        return forward


class Head(nn.Module):
    """The output head: a modulated LayerNorm and a linear layer to the numbers of a token."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.eps = config.eps
        self.modulation = _table(2, config.dim)
        self.linear = nn.Linear(config.dim, config.token_dim)

    def forward(self, residual: Residual, time_FD: Tensor, step: ForwardPass) -> Tensor:
        """Computes the velocity of the tokens, (B, T, E), from the residual and the embedded timesteps."""
        shift, scale = (wide(time_FD) + wide(learned) for learned in self.modulation)
        norm = Modulation(shift, 1 + scale, self.eps)
        normed = step.operations.add_norm(residual.x_BTD, residual.branch_BTD, residual.gate, norm)[1]
        return linear(self.linear, step.operations)(normed)


class CausalDiT(nn.Module):
    """Wan 2.1's text-to-video transformer at any size. A token holds its patch as (patch height, patch width, channel).

    Time embedding, modulation tables and the norm before cross-attention may be float32 in a model of 16 bits, which
    then casts the embedded timesteps alone: the operations on the others compute in float32 anyway.

    Args:
        config: the sizes of the model.
    """

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.dim
        self.patch_embedding = nn.Linear(config.token_dim, dim)
        self.text_embedding = nn.Sequential(nn.Linear(config.text_dim, dim), nn.GELU("tanh"), nn.Linear(dim, dim))
        self.time_embedding = nn.Sequential(nn.Linear(config.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.head = Head(config)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the model computes in, which is that of its patch embedding."""
        return self.patch_embedding.weight.dtype

    @property
    def device(self) -> torch.device:
        """The device that the model lives on."""
        return self.patch_embedding.weight.device

    def _cross_attentions(self) -> Iterator[CrossAttention]:
        return (module for module in self.modules() if isinstance(module, CrossAttention))

    def encode_text(self, embeds_BLE: Tensor) -> TextContext:
        """Computes the keys and values of every layer's cross-attention, once per prompt.

        Args:
            embeds_BLE: the embeddings of the text, (B, text_len, text_dim), with zeros after the end of the text.

        Returns:
            The keys and values, layer by layer.
        """
        text = self.text_embedding(embeds_BLE.to(self.device, self.dtype))
        return [cross_attn.keys(text) for cross_attn in self._cross_attentions()]

    def forward(self, tokens_BTE: Tensor, step: ForwardPass) -> Tensor:
        """Computes the velocity of the last frames of a pass.

        Args:
            tokens_BTE: this rank's tokens of all frames of the pass.
            step: the pass.

        Returns:
            The velocity of this rank's tokens of the last `step.predicted_frames` frames, (B, s·predicted_frames, E).
        """
        waves = sinusoid(step.timesteps_F, self.config.freq_dim).to(next(self.time_embedding.parameters()).dtype)
        time_FD = self.time_embedding(waves).to(self.dtype)  # its weights may be float32 where the model's are not
        modulation_L6FD = self._modulation(time_FD)
        x_BTD = self.patch_embedding(tokens_BTE)
        normed = torch.empty_like(x_BTD) if step.operations.in_place else None
        residual = Residual(wide(x_BTD) if x_BTD.device.type == "cpu" else x_BTD)
        blocks = step.blocks or self.settled(step.operations)
        for layer, (block, modulation_6FD) in enumerate(zip(blocks, modulation_L6FD.unbind(0), strict=True)):
            residual = block(residual, modulation_6FD, layer, step, normed)
        frames = step.predicted_frames
        tokens = tokens_BTE.shape[1] // time_FD.shape[-2] * frames
        return self.head(residual.last(tokens, frames), time_FD[..., -frames:, :], step)

    def settled(self, operations: PassOperations) -> list[BlockForward]:
        """Settles for all passes of a stream by which operations and with which weights the blocks are computed.

        Args:
            operations: the operations between the matrix products.

        Returns:
            A function for each block. It keeps the weights of now: a weight that is replaced later is not seen.
        """
        return [cast(Block, block).settled(operations) for block in self.blocks]

    def _modulation(self, time_FD: Tensor) -> Tensor:
        """Computes all blocks' shifts, factors (one plus the scale) and gates, (L, 6, …, F, D), in float32 or wider."""
        time_F6D = wide(self.time_projection(time_FD)).unflatten(-1, (6, -1))
        learned_L6D = wide(torch.stack([cast(Block, block).modulation for block in self.blocks]))
        learned_L6D = learned_L6D.view(len(self.blocks), *(1,) * (time_FD.ndim - 1), *learned_L6D.shape[1:])
        modulation_LF6D = time_F6D + learned_L6D
        modulation_LF6D[..., 1::3, :] += 1  # scales become factors
        return modulation_LF6D.movedim(-2, 1)


def linear(module: nn.Linear, operations: PassOperations, gelu: bool = False) -> Callable[[Tensor], Tensor]:
    """Returns the function that computes a linear layer in the dtype of its weight.

    Args:
        module: the layer.
        operations: the operations of the pass.
        gelu: whether GELU, in its tanh form, follows.
    """
    compute, bias = operations.linear_gelu if gelu else operations.linear, module.bias
    if type(module) is not nn.Linear:  # a quantized weight is dequantized at every use
        return lambda x: compute(x.to(bias.dtype), module.weight, bias)
    weight, dtype = module.weight, module.weight.dtype
    return lambda x: compute(x if x.dtype == dtype else x.to(dtype), weight, bias)


def _table(rows: int, dim: int) -> nn.Parameter:
    """The learned part of shifts, scales and gates.

    On the meta device no random numbers are drawn, since torch would import sympy for that: 75 MB and over a second.
    """
    table = torch.empty(rows, dim)
    return nn.Parameter(table if table.is_meta else torch.randn(rows, dim) / dim**0.5)


def sinusoid(timesteps_F: Tensor, width: int) -> Tensor:
    """Computes Wan's sinusoidal embedding of numbers such as timesteps in [0, 1000].

    Args:
        timesteps_F: the numbers, (F,) or of any other shape.
        width: the width of the embedding.

    Returns:
        Cosines, then sines, in float64, (F, width).
    """
    index = torch.arange(width // 2, dtype=torch.float64, device=timesteps_F.device)
    angles = timesteps_F.double().unsqueeze(-1) * torch.exp(-math.log(10000) / (width // 2) * index)
    return torch.cat([angles.cos(), angles.sin()], -1)
