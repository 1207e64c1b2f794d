"""The causal DiT: Wan 2.1's text-to-video transformer over the tokens of one pass.

It sees one object that describes the pass and never a rank: self-attention goes through `ForwardPass.attend`, which
the caller binds to a cache and a way across ranks.

Shapes: B batch, F frames of the pass, s tokens of a frame that this rank owns, T = F·s, E numbers in a token,
D model width, H heads, d head width, L text tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from causalrope_kernels import Projection, attention, gate_add, modulate, rms_norm
from causalrope_sp.config import DiTConfig
from causalrope_sp.rope import Rotation

Attend = Callable[[int, Projection], Tensor]
TextContext = list[tuple[Tensor, Tensor]]  # k and v of every layer's cross-attention, (B, L, H, d)


@dataclass(frozen=True)
class ForwardPass:
    """One forward: at which timesteps its frames are, how they are rotated, and what they attend.

    Only the velocity of the last `predicted_frames` is computed. Timesteps are in [0, 1000], one a frame, (F,), or in
    training one a frame and batch entry, (B, F). `attend` takes the layer's number and the projection of its tokens to
    q, k, v, and returns what they attend, (B, T, H, d).
    """

    timesteps_F: Tensor
    predicted_frames: int
    rotation: Rotation
    text: TextContext
    attend: Attend


class SelfAttention(nn.Module):
    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.heads, self.eps = config.num_heads, config.eps
        self.qkv = nn.Linear(config.dim, 3 * config.dim)
        self.norm_q = nn.RMSNorm(config.dim, config.eps)
        self.norm_k = nn.RMSNorm(config.dim, config.eps)
        self.out = nn.Linear(config.dim, config.dim)

    def forward(self, x_BTD: Tensor, layer: int, step: ForwardPass) -> Tensor:
        cos, sin = step.rotation.cos, step.rotation.sin
        projection = Projection(self.qkv(x_BTD), self.norm_q.weight, self.norm_k.weight, cos, sin, self.heads, self.eps)
        return self.out(step.attend(layer, projection).flatten(2))


class CrossAttention(nn.Module):
    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.heads, self.eps = config.num_heads, config.eps
        self.q = nn.Linear(config.dim, config.dim)
        self.kv = nn.Linear(config.dim, 2 * config.dim)
        self.norm_q = nn.RMSNorm(config.dim, config.eps)
        self.norm_k = nn.RMSNorm(config.dim, config.eps)
        self.out = nn.Linear(config.dim, config.dim)

    def keys_and_values(self, text_BLD: Tensor) -> tuple[Tensor, Tensor]:
        k, v = self.kv(text_BLD).chunk(2, -1)
        k = rms_norm(k, self.norm_k.weight, self.eps)
        return k.unflatten(-1, (self.heads, -1)), v.unflatten(-1, (self.heads, -1))

    def forward(self, x_BTD: Tensor, k_BLHD: Tensor, v_BLHD: Tensor) -> Tensor:
        q = rms_norm(self.q(x_BTD), self.norm_q.weight, self.eps).unflatten(-1, (self.heads, -1))
        return self.out(attention(q, k_BLHD, v_BLHD).flatten(2))


class Block(nn.Module):
    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.eps = config.eps
        self.modulation = nn.Parameter(torch.randn(6, config.dim) / config.dim**0.5)
        self.self_attn = SelfAttention(config)
        self.cross_norm = nn.LayerNorm(config.dim, config.eps)
        self.cross_attn = CrossAttention(config)
        self.ffn = nn.Sequential(
            nn.Linear(config.dim, config.ffn_dim), nn.GELU("tanh"), nn.Linear(config.ffn_dim, config.dim)
        )

    def forward(self, x_BTD: Tensor, time_F6D: Tensor, layer: int, step: ForwardPass) -> Tensor:
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = (time_F6D + self.modulation).unbind(-2)
        x = gate_add(x_BTD, self.self_attn(modulate(x_BTD, shift_1, scale_1, self.eps), layer, step), gate_1)
        x = x + self.cross_attn(self.cross_norm(x), *step.text[layer])
        return gate_add(x, self.ffn(modulate(x, shift_2, scale_2, self.eps)), gate_2)


class Head(nn.Module):
    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.eps = config.eps
        self.modulation = nn.Parameter(torch.randn(2, config.dim) / config.dim**0.5)
        self.linear = nn.Linear(config.dim, config.token_dim)

    def forward(self, x_BTD: Tensor, time_FD: Tensor) -> Tensor:
        shift, scale = (time_FD.unsqueeze(-2) + self.modulation).unbind(-2)
        return self.linear(modulate(x_BTD, shift, scale, self.eps))


class CausalDiT(nn.Module):
    """Wan 2.1 text-to-video at any size. A token holds its patch as (patch height, patch width, channel)."""

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
        return self.patch_embedding.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.patch_embedding.weight.device

    def _cross_attentions(self) -> Iterator[CrossAttention]:
        return (module for module in self.modules() if isinstance(module, CrossAttention))

    def encode_text(self, embeds_BLE: Tensor) -> TextContext:
        """Keys and values of every layer's cross-attention; done once a prompt.

        `embeds_BLE` is (B, text_len, text_dim), zeros after the text's end.
        """
        text = self.text_embedding(embeds_BLE.to(self.device, self.dtype))
        return [cross_attn.keys_and_values(text) for cross_attn in self._cross_attentions()]

    def forward(self, tokens_BTE: Tensor, step: ForwardPass) -> Tensor:
        """The velocity of the tokens of the last `step.predicted_frames` frames."""
        time_FD = self.time_embedding(sinusoid(step.timesteps_F, self.config.freq_dim).to(self.dtype))
        time_F6D = self.time_projection(time_FD).unflatten(-1, (6, -1))
        x = self.patch_embedding(tokens_BTE)
        for layer, block in enumerate(self.blocks):
            x = block(x, time_F6D, layer, step)
        frames = step.predicted_frames
        tokens = x.shape[1] // time_FD.shape[-2] * frames
        return self.head(x[:, -tokens:], time_FD[..., -frames:, :])


def sinusoid(timesteps_F: Tensor, width: int) -> Tensor:
    """Wan's sinusoidal embedding of timesteps in [0, 1000]: cosines, then sines, in float64, (F, width)."""
    place = torch.arange(width // 2, dtype=torch.float64, device=timesteps_F.device)
    angles = timesteps_F.double().unsqueeze(-1) * torch.exp(-math.log(10000) / (width // 2) * place)
    return torch.cat([angles.cos(), angles.sin()], -1)
