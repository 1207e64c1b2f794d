"""Latte's DiT (arXiv 2401.03048, variant 1). A layer is a spatial block, which attends within a frame and to the text,
and a temporal block, which attends across frames.

Between blocks a rank holds all tokens of some frames. Attention across frames needs all frames of some tokens instead:
`LattePass.to_tokens` switches to that, `to_frames` switches back. The model itself knows of no ranks.

Shapes: B batch, F frames of the pass on this rank, S tokens of a frame, E numbers in a token, D model width, H heads, d
head width, L text tokens; across frames N = B·s entries of this rank's s tokens, with all Q frames of the pass.
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

FREQUENCIES = 256  # numbers of a timestep's sinusoidal embedding
MLP_RATIO = 4

Switch = Callable[[int, Tensor], Tensor]
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class LattePass:
    """What one forward of the model needs besides its tokens.

    Attributes:
        timesteps_F: the timestep of each frame.
        position_SD: the embedding of each token's position, added to the tokens of every frame.
        time_FD: the embedding of each frame's time, added to its tokens before the first temporal block; None for a
            single image.
        text: keys and values of every layer's cross-attention.
        to_tokens: maps a layer's number and (B, F, S, D) to (N, Q, D), from frames to tokens.
        to_frames: the inverse of `to_tokens`.
        attend: maps a layer's number and q, k, v, each (N, Q, H, d), to attention across frames, (N, Q, H, d).
        attention: the attention kernels' backend.
        output: returns the output of each attention and feed-forward. It calls the function that computes the output,
            or returns that of an earlier pass.
    """

    timesteps_F: Tensor
    position_SD: Tensor
    time_FD: Tensor | None
    text: list[Keys]
    to_tokens: Switch
    to_frames: Switch
    attend: Attend
    attention: str = "auto"
    output: OutputOf = computed


class Attention(nn.Module):
    """The projections of self-attention; the caller computes the attention itself."""

    def __init__(self, config: LatteConfig) -> None:
        super().__init__()
        self.heads = config.num_attention_heads
        self.qkv = nn.Linear(config.dim, 3 * config.dim, config.attention_bias)
        self.out = nn.Linear(config.dim, config.dim)

    def forward(self, x_NTD: Tensor, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        """Projects (N, T, D) to q, k, v of (N, T, H, d), calls `attend` with them, and projects its output."""
        q, k, v = (x.unflatten(-1, (self.heads, -1)) for x in self.qkv(x_NTD).chunk(3, -1))
        return self.out(attend(q, k, v).flatten(2))


class CrossAttention(nn.Module):
    """Attention of a frame's tokens to the text."""

    def __init__(self, config: LatteConfig) -> None:
        super().__init__()
        self.heads = config.num_attention_heads
        self.q = nn.Linear(config.dim, config.dim, config.attention_bias)
        self.kv = nn.Linear(config.dim, 2 * config.dim, config.attention_bias)
        self.out = nn.Linear(config.dim, config.dim)

    def keys(self, text_BLD: Tensor) -> Keys:
        """Computes the keys and values of a text, each (B, L, H, d)."""
        k, v = (x.unflatten(-1, (self.heads, -1)) for x in self.kv(text_BLD).chunk(2, -1))
        return Keys(k, v)

    def forward(self, x_BFSD: Tensor, keys: Keys, backend: str) -> Tensor:
        """Returns what the tokens attend in the text, of their shape."""
        q = self.q(x_BFSD).flatten(1, 2).unflatten(-1, (self.heads, -1))
        return self.out(attention(q, keys, backend).flatten(2)).view_as(x_BFSD)


class FeedForward(nn.Module):
    """Two Linears with GELU (tanh) between them."""

    def __init__(self, config: LatteConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.dim, MLP_RATIO * config.dim)
        self.down = nn.Linear(MLP_RATIO * config.dim, config.dim)

    def forward(self, x_BFSD: Tensor) -> Tensor:
        """Returns a tensor of the same shape."""
        return self.down(linear_gelu(x_BFSD, self.up.weight, self.up.bias))


class Block(nn.Module):
    """The common parts of both kinds of block: norms, modulation, self-attention, feed-forward."""

    def __init__(self, config: LatteConfig) -> None:
        super().__init__()
        self.eps = config.norm_eps
        self.modulation = nn.Parameter(torch.randn(6, config.dim) / config.dim**0.5)
        self.attn = Attention(config)
        self.ffn = FeedForward(config)

    def modulations(self, time_F6D: Tensor) -> tuple[Tensor, ...]:
        """Returns shift, scale and gate of attention, then those of the feed-forward, each (F, 1, D)."""
        return (time_F6D + self.modulation).unsqueeze(-2).unbind(-3)

    def normed(self, x_BFSD: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        """Returns the tokens normalized, scaled and shifted."""
        return torch.addcmul(shift, layer_norm(x_BFSD, x_BFSD.shape[-1:], eps=self.eps), 1 + scale)


class SpatialBlock(Block):
    """A block that attends within each frame, then to the text."""

    def __init__(self, config: LatteConfig) -> None:
        super().__init__(config)
        self.cross_attn = CrossAttention(config)

    def forward(self, x_BFSD: Tensor, time_F6D: Tensor, layer: int, step: LattePass) -> Tensor:
        """Runs the block of a layer; `time_F6D` is the projected embedding of each frame's timestep."""
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
    """A block that attends across frames, each token to those of its position."""

    def forward(self, x_BFSD: Tensor, time_F6D: Tensor, layer: int, step: LattePass) -> Tensor:
        """Runs the block of a layer; `time_F6D` is the projected embedding of each frame's timestep."""
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
    """Latte at any size. A token holds its patch as (patch height, patch width, channel).

    Args:
        config: the sizes.
    """

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
        """The dtype of the weights."""
        return self.head.weight.dtype

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.head.weight.device

    def encode_text(self, embeds_BLE: Tensor) -> list[Keys]:
        """Computes the keys and values of every layer's cross-attention.

        Args:
            embeds_BLE: text embeddings, (B, L, caption_channels).

        Returns:
            One `Keys` a layer, of (B, L, H, d).
        """
        text = self.text_embedding(embeds_BLE.to(self.device, self.dtype))
        return [block.cross_attn.keys(text) for block in self.spatial if isinstance(block, SpatialBlock)]

    def forward(self, tokens_BFSE: Tensor, step: LattePass) -> Tensor:
        """Runs one pass.

        Args:
            tokens_BFSE: the tokens of this rank's frames.
            step: the pass's timesteps, positions, text and attention.

        Returns:
            The prediction for every token, (B, F, S, patch²·out_channels).
        """
        time_FD = self.time_embedding(timestep_waves(step.timesteps_F, FREQUENCIES).to(self.dtype))
        time_F6D = self.time_projection(time_FD).unflatten(-1, (6, -1))
        x = self.patch_embedding(tokens_BFSE) + step.position_SD
        for layer, (spatial, temporal) in enumerate(zip(self.spatial, self.temporal, strict=True)):
            x = spatial(x, time_F6D, layer, step)
            if layer == 0 and step.time_FD is not None:
                x = x + step.time_FD.unsqueeze(-2)
            x = temporal(x, time_F6D, layer, step)
        shift, scale = (time_FD.unsqueeze(-2) + self.modulation).unsqueeze(-2).unbind(-3)
        # the published model has this epsilon here, whatever that of its blocks is
        return self.head(torch.addcmul(shift, layer_norm(x, x.shape[-1:], eps=1e-6), 1 + scale))
