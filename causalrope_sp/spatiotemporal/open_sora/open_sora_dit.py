"""Open-Sora 1.2's DiT, STDiT3: both its blocks attend to the text, and queries and keys are normed head by head.

Shapes: B batch, F timesteps, L text tokens, E their width, D model width, H heads, d head width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from causalrope_kernels import Keys, PassOperations
from causalrope_sp.models.causal_dit import sinusoid
from causalrope_sp.models.modulation import PassModulation
from causalrope_sp.models.parts import BlockModule, TextAttention, text_module
from causalrope_sp.reuse.policy import KINDS
from causalrope_sp.spatiotemporal.model import (
    FREQUENCIES,
    SelfAttention,
    SpatialBlock,
    SpatioTemporalDiT,
    TemporalBlock,
    TextKeys,
    timestep_mlp,
)
from causalrope_sp.spatiotemporal.open_sora.open_sora_config import OpenSoraConfig

EPS = 1e-6  # of all norms


class NormedSelfAttention(SelfAttention):
    """Self-attention with an RMSNorm of each head's queries and keys."""

    def __init__(self, config: OpenSoraConfig) -> None:
        super().__init__(config.hidden_size, config.num_heads)
        self.norm_q = nn.RMSNorm(config.head_dim, EPS)
        self.norm_k = nn.RMSNorm(config.head_dim, EPS)

    def settled_norms(self, operations: PassOperations) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Returns the function that norms queries and keys, (N, T, H, d)."""
        norm_q, norm_k = operations.settled_rms_norm(), operations.settled_rms_norm()
        weight_q, weight_k = self.norm_q.weight, self.norm_k.weight
        return lambda q, k: (norm_q(q.contiguous(), weight_q, EPS), norm_k(k.contiguous(), weight_k, EPS))


class PackedTextAttention(TextAttention):
    """Attention on texts of different lengths, without padding: the keys are a list, for some batch entries each."""

    def settled_attention(self, operations: PassOperations) -> Callable[..., Tensor]:
        """Returns the function of queries and the list of keys."""
        attention = operations.attention

        def attended(q_BTHD: Tensor, keys: Sequence[Keys], *, reuse_q: bool) -> Tensor:
            if len(keys) == 1:
                return attention(q_BTHD, keys[0], reuse_q=reuse_q)
            parts = q_BTHD.split([len(each.k) for each in keys])
            return torch.cat([attention(q, each) for q, each in zip(parts, keys, strict=True)])

        return attended


class OpenSoraSpatialBlock(SpatialBlock):
    """A block that attends within each frame, then to the text."""

    def __init__(self, config: OpenSoraConfig) -> None:
        super().__init__(NormedSelfAttention(config), config.hidden_size)
        self.cross_attn = PackedTextAttention(config.hidden_size, config.num_heads)

    def modules_between(self, operations: PassOperations) -> Sequence[BlockModule]:
        """Returns attention on the text."""
        return [text_module("cross", operations, self.cross_attn, keys_of=lambda step: step.text.spatial)]


class OpenSoraTemporalBlock(TemporalBlock):
    """A block that attends across frames, then to the text."""

    def __init__(self, config: OpenSoraConfig) -> None:
        super().__init__(NormedSelfAttention(config), config.hidden_size)
        self.cross_attn = PackedTextAttention(config.hidden_size, config.num_heads)

    def modules_between(self, operations: PassOperations) -> Sequence[BlockModule]:
        """Returns attention on the text."""
        return [text_module("temporal-cross", operations, self.cross_attn, keys_of=lambda step: step.text.temporal)]


class OpenSoraDiT(SpatioTemporalDiT):
    """STDiT3 at any size.

    Args:
        config: the sizes.
    """

    kinds = KINDS

    def __init__(self, config: OpenSoraConfig) -> None:
        layers, patch = range(config.depth), config.patch_size**2
        super().__init__(
            [OpenSoraSpatialBlock(config) for _ in layers],
            [OpenSoraTemporalBlock(config) for _ in layers],
            config.hidden_size,
            patch * config.in_channels,
            config.caption_channels,
            patch * config.predicted_channels,
            EPS,
        )
        self.config = config
        self.fps_embedding = timestep_mlp(config.hidden_size)
        self.null_text = nn.Parameter(torch.zeros(config.model_max_length, config.caption_channels))

    def encode_text(self, texts_LE: Sequence[Tensor]) -> TextKeys:
        """Computes the keys and values of every block's attention on the text.

        Args:
            texts_LE: the embeddings of each batch entry's text, (L, caption_channels), without padding.

        Returns:
            For every block a list of keys and values, (b, L, H, d): consecutive entries of one length share an item.
        """
        groups: list[list[Tensor]] = []
        for text in texts_LE:
            if groups and groups[-1][0].shape == text.shape:
                groups[-1].append(text)
            else:
                groups.append([text])
        embedded = [self.text_embedding(torch.stack(group).to(self.device, self.dtype)) for group in groups]

        def keys(blocks: nn.ModuleList) -> list[list[Keys]]:
            attentions = [block.cross_attn for block in blocks]
            return [
                [attention.keys(text) for text in embedded]
                for attention in attentions
                if isinstance(attention, PackedTextAttention)
            ]

        return TextKeys(keys(self.spatial), keys(self.temporal))

    def modulation(self, timesteps_F: Tensor, fps: float) -> PassModulation:
        """Computes what blocks and head take from the timesteps and the frame rate, in frames a second."""
        both = (timesteps_F, torch.tensor([fps], device=self.device))
        time_FD, rate_1D = (
            embedding(sinusoid(numbers, FREQUENCIES).to(self.dtype))
            for embedding, numbers in zip((self.time_embedding, self.fps_embedding), both, strict=True)
        )
        return self.modulated(time_FD + rate_1D)
