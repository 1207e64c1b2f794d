"""Latte's DiT: layers of a block that attends within a frame and the text, and a block that attends across frames.

Between blocks a rank holds some frames, whole. Only attention across frames needs the others: `LattePass.to_tokens` has
each rank bring all frames of some tokens, `to_frames` is the way back. The model sees no rank.

Shapes: B batch, F frames of the pass on this rank, S tokens of a frame, E numbers in a token, D model width, H heads, d
head width, L text tokens; across frames N = B·s entries of this rank's tokens, with all Q frames of the pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from causalrope_kernels import Keys, attention, linear_gelu
from causalrope_sp.latte.latte_config import LatteConfig
from causalrope_sp.latte.positions import timestep_waves
from causalrope_sp.reuse.output_store import OutputOf, computed

FREQUENCIES = 256  # waves of the timestep embedding
MLP_RATIO = 4

Switch = Callable[[int, Tensor], Tensor]
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class LattePass:
    """One forward: its timesteps, one a frame, (F,), where its tokens and frames stand, and what they attend.

    `place_SD` is added to every frame's tokens; `time_FD` to all tokens of a frame, before the first attention across
    frames; None for a picture. `text` holds the keys of every layer's cross-attention. `to_tokens` takes a layer's
    number and (B, F, S, D) to (N, Q, D), `to_frames` back. `attend` takes q, k, v, each (N, Q, H, d), to what they
    attend across frames. `output` is asked for each attention's and feed-forward's output, and may have it from an
    earlier pass; then none of these is called.
    """

    timesteps_F: Tensor
    place_SD: Tensor
    time_FD: Tensor | None
    text: list[Keys]
    to_tokens: Switch
    to_frames: Switch
    attend: Attend
    attention: str = "auto"
    output: OutputOf = computed


class Attention(nn.Module):
    """Self-attention; who attends whom is the caller's."""

    def __init__(self, config: LatteConfig) -> None:
        super().__init__()
        self.heads = config.num_attention_heads
        self.qkv = nn.Linear(config.dim, 3 * config.dim, config.attention_bias)
        self.out = nn.Linear(config.dim, config.dim)

    def forward(self, x_NTD: Tensor, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        q, k, v = (x.unflatten(-1, (self.heads, -1)) for x in self.qkv(x_NTD).chunk(3, -1))
        return self.out(attend(q, k, v).flatten(2))


class CrossAttention(nn.Module):
    def __init__(self, config: LatteConfig) -> None:
        super().__init__()
        self.heads = config.num_attention_heads
        self.q = nn.Linear(config.dim, config.dim, config.attention_bias)
        self.kv = nn.Linear(config.dim, 2 * config.dim, config.attention_bias)
        self.out = nn.Linear(config.dim, config.dim)

    def keys(self, text_BLD: Tensor) -> Keys:
        k, v = (x.unflatten(-1, (self.heads, -1)) for x in self.kv(text_BLD).chunk(2, -1))
        return Keys(k, v)

    def forward(self, x_BFSD: Tensor, keys: Keys, backend: str) -> Tensor:
        q = self.q(x_BFSD).flatten(1, 2).unflatten(-1, (self.heads, -1))
        return self.out(attention(q, keys, backend).flatten(2)).view_as(x_BFSD)


class FeedForward(nn.Module):
    def __init__(self, config: LatteConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.dim, MLP_RATIO * config.dim)
        self.down = nn.Linear(MLP_RATIO * config.dim, config.dim)

    def forward(self, x_BFSD: Tensor) -> Tensor:
        return self.down(linear_gelu(x_BFSD, self.up.weight, self.up.bias))


class Block(nn.Module):
    """What both kinds of block share: norms, modulation, self-attention, feed-forward."""

    def __init__(self, config: LatteConfig) -> None:
        super().__init__()
        self.eps = config.norm_eps
        self.modulation = nn.Parameter(torch.randn(6, config.dim) / config.dim**0.5)
        self.attn = Attention(config)
        self.ffn = FeedForward(config)

    def modulations(self, time_F6D: Tensor) -> tuple[Tensor, ...]:
        """Shift, scale, gate of attention and of the feed-forward, each (F, 1, D)."""
        return (time_F6D + self.modulation).unsqueeze(-2).unbind(-3)

    def normed(self, x_BFSD: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return torch.addcmul(shift, layer_norm(x_BFSD, x_BFSD.shape[-1:], eps=self.eps), 1 + scale)


class SpatialBlock(Block):
    def __init__(self, config: LatteConfig) -> None:
        super().__init__(config)
        self.cross_attn = CrossAttention(config)

    def forward(self, x_BFSD: Tensor, time_F6D: Tensor, layer: int, step: LattePass) -> Tensor:
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = self.modulations(time_F6D)
        x = x_BFSD
        normed = self.normed(x, shift_1, scale_1)
        x = torch.addcmul(x, gate_1, step.output(layer, "self", partial(self._within_frames, normed, step)))
        x = x + step.output(layer, "cross", partial(self.cross_attn, x, step.text[layer], step.attention))
        normed = self.normed(x, shift_2, scale_2)
        return torch.addcmul(x, gate_2, step.output(layer, "mlp", partial(self.ffn, normed)))

    def _within_frames(self, x_BFSD: Tensor, step: LattePass) -> Tensor:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attention(q, Keys(k, v), step.attention)

        return self.attn(x_BFSD.flatten(0, 1), attend).view_as(x_BFSD)


class TemporalBlock(Block):
    def forward(self, x_BFSD: Tensor, time_F6D: Tensor, layer: int, step: LattePass) -> Tensor:
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = self.modulations(time_F6D)
        x = x_BFSD
        normed = self.normed(x, shift_1, scale_1)
        attended = step.output(layer, "temporal", partial(self._across_frames, normed, layer, step))
        x = torch.addcmul(x, gate_1, attended)
        normed = self.normed(x, shift_2, scale_2)
        return torch.addcmul(x, gate_2, step.output(layer, "temporal-mlp", partial(self.ffn, normed)))

    def _across_frames(self, x_BFSD: Tensor, layer: int, step: LattePass) -> Tensor:
        x_NQD = step.to_tokens(layer, x_BFSD)
        return step.to_frames(layer, self.attn(x_NQD, partial(step.attend, layer)))


class LatteDiT(nn.Module):
    """Latte at any size. A token holds its patch as (patch height, patch width, channel)."""

    def __init__(self, config: LatteConfig) -> None:
        super().__init__()
        self.config = config
        dim, patch = config.dim, config.patch_size**2
        self.patch_embedding = nn.Linear(patch * config.in_channels, dim)
        self.text_embedding = nn.Sequential(
            nn.Linear(config.caption_channels, dim), nn.GELU("tanh"), nn.Linear(dim, dim)
        )
        self.time_embedding = nn.Sequential(nn.Linear(FREQUENCIES, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.spatial = nn.ModuleList(SpatialBlock(config) for _ in range(config.num_layers))
        self.temporal = nn.ModuleList(TemporalBlock(config) for _ in range(config.num_layers))
        self.modulation = nn.Parameter(torch.randn(2, dim) / dim**0.5)
        self.head = nn.Linear(dim, patch * config.out_channels)

    @property
    def dtype(self) -> torch.dtype:
        return self.head.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.head.weight.device

    def encode_text(self, embeds_BLE: Tensor) -> list[Keys]:
        """Keys and values of every layer's cross-attention; `embeds_BLE` is (B, L, caption_channels)."""
        text = self.text_embedding(embeds_BLE.to(self.device, self.dtype))
        return [block.cross_attn.keys(text) for block in self.spatial if isinstance(block, SpatialBlock)]

    def forward(self, tokens_BFSE: Tensor, step: LattePass) -> Tensor:
        """What the model predicts of every token, (B, F, S, patch·out_channels)."""
        time_FD = self.time_embedding(timestep_waves(step.timesteps_F, FREQUENCIES).to(self.dtype))
        time_F6D = self.time_projection(time_FD).unflatten(-1, (6, -1))
        x = self.patch_embedding(tokens_BFSE) + step.place_SD
        for layer, (spatial, temporal) in enumerate(zip(self.spatial, self.temporal, strict=True)):
            x = spatial(x, time_F6D, layer, step)
            if layer == 0 and step.time_FD is not None:
                x = x + step.time_FD.unsqueeze(-2)
            x = temporal(x, time_F6D, layer, step)
        shift, scale = (time_FD.unsqueeze(-2) + self.modulation).unsqueeze(-2).unbind(-3)
        # the published model fixes this norm's epsilon, whatever that of its blocks
        return self.head(torch.addcmul(shift, layer_norm(x, x.shape[-1:], eps=1e-6), 1 + scale))
