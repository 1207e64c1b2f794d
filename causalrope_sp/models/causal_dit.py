"""The causal DiT: Wan 2.1's text-to-video transformer over the tokens of one pass.

The model receives one object that describes the pass and knows nothing of ranks: self-attention calls
`ForwardPass.attend`, which the caller binds to a cache and an attention strategy.

Shapes: B batch, F frames of the pass, s tokens of a frame that this rank owns, T = F·s, E numbers in a token,
D model width, H heads, d head width, L text tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from causalrope_kernels import (
    Affine,
    ByFrame,
    Keys,
    Modulation,
    Projection,
    Rotation,
    add_norm,
    attention,
    linear_gelu,
    rms_norm,
)
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
        attention: the attention backend of cross-attention.
        output: takes a layer's number, the kind of a module ("self", "cross" or "mlp") and a function that computes
            its output. It returns that output, or the stored output of an earlier pass (`reuse`).
    """

    timesteps_F: Tensor
    predicted_frames: int
    rotation: Rotation
    text: TextContext
    attend: Attend
    attention: str = "auto"
    output: OutputOf = computed


@dataclass(frozen=True)
class Residual:
    """The residual between two blocks as a sum that is not computed yet: x + branch·gate.

    The next norm computes the sum as it reads it, so that both take one pass over memory.

    Args:
        x_BTD: the residual before the last module.
        branch_BTD: the output of the last module, or None for nothing to add.
        gate: the factor of the output by frame, or None for 1.
    """

    x_BTD: Tensor
    branch_BTD: Tensor | None = None
    gate: ByFrame | None = None

    def last(self, tokens: int, frames: int) -> Residual:
        """Returns the residual of the last `frames` frames, which have `tokens` tokens in all."""
        branch = None if self.branch_BTD is None else self.branch_BTD[:, -tokens:]
        gate = None if self.gate is None else self.gate.frames(slice(-frames, None))
        return Residual(self.x_BTD[:, -tokens:], branch, gate)


class SelfAttention(nn.Module):
    """Self-attention with an RMSNorm of q and k over all of D."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.heads, self.eps = config.num_heads, config.eps
        self.qkv = nn.Linear(config.dim, 3 * config.dim)
        self.norm_q = nn.RMSNorm(config.dim, config.eps)
        self.norm_k = nn.RMSNorm(config.dim, config.eps)
        self.out = nn.Linear(config.dim, config.dim)

    def forward(self, x_BTD: Tensor, layer: int, step: ForwardPass) -> Tensor:
        """Projects the tokens to q, k and v, attends, and projects the result, (B, T, D)."""
        qkv_BFSN = self.qkv(x_BTD).unflatten(1, (step.timesteps_F.shape[-1], -1))
        weights = self.norm_q.weight, self.norm_k.weight
        projection = Projection(qkv_BFSN, *weights, step.rotation, self.heads, self.eps)
        return self.out(step.attend(layer, projection).flatten(2))


class CrossAttention(nn.Module):
    """Attention of the tokens on the text, with an RMSNorm of q and k over all of D."""

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

    def forward(self, x_BTD: Tensor, keys: Keys, backend: str) -> Tensor:
        """Attends the text's keys with an attention backend and projects the result, (B, T, D)."""
        q = rms_norm(self.q(x_BTD), self.norm_q.weight, self.eps).unflatten(-1, (self.heads, -1))
        return self.out(attention(q, keys, backend).flatten(2))


class FeedForward(nn.Module):
    """Two linear layers with GELU, in its tanh form, between them."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.dim, config.ffn_dim)
        self.down = nn.Linear(config.ffn_dim, config.dim)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Computes the layer, (B, T, D)."""
        return self.down(linear_gelu(x_BTD, self.up.weight, self.up.bias))


class Block(nn.Module):
    """A block of Wan's DiT: self-attention, cross-attention and feed-forward, modulated by the timestep."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.eps = config.eps
        self.modulation = _table(6, config.dim)
        self.self_attn = SelfAttention(config)
        self.cross_norm = nn.LayerNorm(config.dim, config.eps)
        self.cross_attn = CrossAttention(config)
        self.ffn = FeedForward(config)

    def forward(self, residual: Residual, time_F6D: Tensor, layer: int, step: ForwardPass) -> Residual:
        """Computes the block.

        Args:
            residual: the residual before the block.
            time_F6D: the parts of the block's six modulation vectors that come from the timestep, by frame.
            layer: the number of the block.
            step: the pass.

        Returns:
            The residual after the block.
        """
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = ByFrame.unbind(time_F6D, self.modulation)
        cross_norm = Affine(self.cross_norm.weight, self.cross_norm.bias, self.eps)
        x, normed = add_norm(residual.x_BTD, residual.branch_BTD, residual.gate, Modulation(shift_1, scale_1, self.eps))
        attended = step.output(layer, "self", partial(self.self_attn, normed, layer, step))
        x, normed = add_norm(x, attended, gate_1, cross_norm)
        attended = step.output(layer, "cross", partial(self.cross_attn, normed, step.text[layer], step.attention))
        x, normed = add_norm(x, attended, None, Modulation(shift_2, scale_2, self.eps))
        return Residual(x, step.output(layer, "mlp", partial(self.ffn, normed)), gate_2)


class Head(nn.Module):
    """The output head: a modulated LayerNorm and a linear layer to the numbers of a token."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.eps = config.eps
        self.modulation = _table(2, config.dim)
        self.linear = nn.Linear(config.dim, config.token_dim)

    def forward(self, residual: Residual, time_FD: Tensor) -> Tensor:
        """Computes the velocity of the tokens, (B, T, E), from the residual and the embedded timesteps."""
        shift, scale = (ByFrame(time_FD, learned) for learned in self.modulation)
        norm = Modulation(shift, scale, self.eps)
        return self.linear(add_norm(residual.x_BTD, residual.branch_BTD, residual.gate, norm)[1])


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
        time_F6D = self.time_projection(time_FD).unflatten(-1, (6, -1))
        residual = Residual(self.patch_embedding(tokens_BTE))
        for layer, block in enumerate(self.blocks):
            residual = block(residual, time_F6D, layer, step)
        frames = step.predicted_frames
        tokens = tokens_BTE.shape[1] // time_FD.shape[-2] * frames
        return self.head(residual.last(tokens, frames), time_FD[..., -frames:, :])


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
