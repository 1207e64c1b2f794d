"""Latte's DiT (arXiv 2401.03048, variant 1): its spatial blocks attend to the text, its temporal blocks do not.

Shapes: B batch, F timesteps, L text tokens, E their width, D model width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from causalrope_kernels import PassOperations
from causalrope_sp.models.modulation import PassModulation
from causalrope_sp.models.parts import BlockModule, TextAttention, text_module
from causalrope_sp.reuse.policy import Kind
from causalrope_sp.spatiotemporal.latte.latte_config import LatteConfig
from causalrope_sp.spatiotemporal.model import (
    FREQUENCIES,
    SelfAttention,
    SpatialBlock,
    SpatioTemporalDiT,
    TemporalBlock,
    TextKeys,
)
from causalrope_sp.spatiotemporal.positions import PERIOD


class LatteSpatialBlock(SpatialBlock):
    """A block that attends within each frame, then to the text."""

    def __init__(self, config: LatteConfig) -> None:
        super().__init__(_attention(config), config.dim)
        self.cross_attn = TextAttention(config.dim, config.num_attention_heads, config.attention_bias)

    def modules_between(self, operations: PassOperations) -> Sequence[BlockModule]:
        """Returns attention on the text."""
        return [text_module("cross", operations, self.cross_attn, keys_of=lambda step: step.text.spatial)]


class LatteTemporalBlock(TemporalBlock):
    """A block that attends across frames."""

    def __init__(self, config: LatteConfig) -> None:
        super().__init__(_attention(config), config.dim)

    def modules_between(self, operations: PassOperations) -> Sequence[BlockModule]:
        """Returns none."""
        return []


class LatteDiT(SpatioTemporalDiT):
    """Latte at any size.

    Args:
        config: the sizes.
    """

    kinds: tuple[Kind, ...] = ("self", "cross", "mlp", "temporal", "temporal-mlp")

    def __init__(self, config: LatteConfig) -> None:
        layers, patch = range(config.num_layers), config.patch_size**2
        super().__init__(
            [LatteSpatialBlock(config) for _ in layers],
            [LatteTemporalBlock(config) for _ in layers],
            config.dim,
            patch * config.in_channels,
            config.caption_channels,
            patch * config.out_channels,
            config.norm_eps,
        )
        self.config = config

    def encode_text(self, embeds_BLE: Tensor) -> TextKeys:
        """Computes the keys and values of every layer's attention on the text, (B, L, H, d) each.

        Args:
            embeds_BLE: text embeddings, (B, L, caption_channels).
        """
        text = self.text_embedding(embeds_BLE.to(self.device, self.dtype))
        return TextKeys([block.cross_attn.keys(text) for block in self.spatial if isinstance(block, LatteSpatialBlock)])

    def modulation(self, timesteps_F: Tensor) -> PassModulation:
        """Computes what blocks and head take from the timesteps."""
        return self.modulated(self.time_embedding(timestep_waves(timesteps_F, FREQUENCIES).to(self.dtype)))


def timestep_waves(timesteps_F: Tensor, width: int) -> Tensor:
    """Embeds timesteps, in float32 throughout, as the published model does.

    Args:
        timesteps_F: the timesteps.
        width: numbers of an embedding, divisible by 2.

    Returns:
        (F, width): the cosines, then the sines.
    """
    exponents = -math.log(PERIOD) * torch.arange(width // 2, dtype=torch.float32, device=timesteps_F.device)
    angles = timesteps_F.float().unsqueeze(-1) * torch.exp(exponents / (width // 2))
    return torch.cat([angles.cos(), angles.sin()], -1)


def _attention(config: LatteConfig) -> SelfAttention:
    return SelfAttention(config.dim, config.num_attention_heads, config.attention_bias)
