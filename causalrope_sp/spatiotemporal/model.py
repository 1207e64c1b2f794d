"""What the DiTs with alternating spatial and temporal blocks share: their blocks, and the forward over them.

A spatial block attends within a frame, a temporal block across frames. Between blocks a rank holds all tokens of some
frames. Attention across frames needs all frames of some tokens instead: `SpatioTemporalPass.to_tokens` switches to
that, `to_frames` switches back. The model itself knows of no ranks.

Shapes: B batch, F frames of the pass on this rank, S tokens of a frame, T = F·S, E numbers in a token, D model width,
H heads, d head width, L text tokens; across frames N = B·s entries of this rank's s tokens, with all Q frames of the
pass.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from causalrope_kernels import Keys, PassOperations
from causalrope_kernels.reference import wide
from causalrope_sp.models.modulation import PassModulation, modulate, modulation_table
from causalrope_sp.models.parts import (
    BlockForward,
    BlockModule,
    FeedForward,
    Residual,
    SettledModel,
    attention_module,
    feed_forward_module,
    linear,
    settled_block,
)
from causalrope_sp.reuse.output_store import OutputOf
from causalrope_sp.reuse.policy import Kind

FREQUENCIES = 256  # numbers of a timestep's sinusoidal embedding
MLP_RATIO = 4
HEAD_EPS = 1e-6  # the published models have this epsilon in the head, whatever that of their blocks is

Switch = Callable[[int, Tensor], Tensor]
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class SpatioTemporalPass:
    """What one forward of a model needs besides its tokens.

    Attributes:
        modulation: what `SpatioTemporalDiT.modulation` returns for the timesteps of the frames.
        position_SD: the embedding of each token's position, added to the tokens of every frame.
        time_FD: the embedding of each frame's time, added to its tokens before the first temporal block; None for
            nothing.
        text: the text's keys and values as `SpatioTemporalDiT.encode_text` returns them.
        to_tokens: maps a layer's number and (B, F, S, D) to (N, Q, D), from frames to tokens.
        to_frames: the inverse of `to_tokens`.
        attend: maps a layer's number and q, k, v, each (N, Q, H, d), to attention across frames, (N, Q, H, d).
        operations: the operations between the matrix products.
        settled: what `SpatioTemporalDiT.settled` returns for these operations.
        output: returns the output of each attention and feed-forward, and its gate; see `OutputOf`.
        timestep: the timestep of the frames that are denoised.
        denoised_tokens: F·S.
    """

    modulation: PassModulation
    position_SD: Tensor
    time_FD: Tensor | None
    text: TextKeys
    to_tokens: Switch
    to_frames: Switch
    attend: Callable[[int, Tensor, Tensor, Tensor], Tensor]
    operations: PassOperations
    settled: SettledModel
    output: OutputOf
    timestep: float
    denoised_tokens: int

    @property
    def tokens(self) -> int:
        """S."""
        return len(self.position_SD)


@dataclass(frozen=True)
class TextKeys:
    """The keys and values of the text, for every layer's attention on the text.

    Attributes:
        spatial: those of the spatial blocks.
        temporal: those of the temporal blocks; none for a model whose temporal blocks do not read the text.
    """

    spatial: Sequence[Any]
    temporal: Sequence[Any] = ()


class SelfAttention(nn.Module):
    """The weights of self-attention, within a frame or across frames.

    Args:
        dim: D.
        heads: H.
        bias: whether the projections to queries, keys and values have a bias.
    """

    def __init__(self, dim: int, heads: int, bias: bool = True) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias)
        self.out = nn.Linear(dim, dim)

    def settled_norms(self, operations: PassOperations) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Returns the function that makes queries and keys of the projected ones; a model with norms overrides this."""
        return lambda q, k: (q, k)

    def settled(self, operations: PassOperations) -> Callable[[Tensor, Attend], Tensor]:
        """Returns the function that projects (N, T, D) to q, k, v of (N, T, H, d), attends and projects the result."""
        qkv, out, heads = linear(self.qkv, operations), linear(self.out, operations), self.heads
        norms = self.settled_norms(operations)

        def attended(x_NTD: Tensor, attend: Attend) -> Tensor:
            q, k, v = qkv(x_NTD).unflatten(-1, (3, heads, -1)).unbind(2)
            return out(attend(*norms(q, k), v).flatten(2))

        return attended


class Block(nn.Module, ABC):
    """The weights that both kinds of block have in all models."""

    def __init__(self, attention: SelfAttention, dim: int) -> None:
        super().__init__()
        self.modulation = modulation_table(6, dim)
        self.attn = attention
        self.ffn = FeedForward(dim, MLP_RATIO * dim)

    @abstractmethod
    def modules_between(self, operations: PassOperations) -> Sequence[BlockModule]:
        """Returns the modules between self-attention and feed-forward."""


class SpatialBlock(Block):
    """A block that attends within each frame."""

    def settled(self, operations: PassOperations) -> BlockForward:
        """Returns the function that computes the block by these operations, with all weights looked up."""
        attended = self.attn.settled(operations)

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return operations.attention(q, Keys(k, v))

        def within_frames(x_BTD: Tensor, layer: int, step: SpatioTemporalPass, kept: int | None) -> Tensor:
            return attended(x_BTD.view(-1, step.tokens, x_BTD.shape[-1]), attend).view(x_BTD.shape)

        return settled_block(
            [
                attention_module("self", operations, within_frames),
                *self.modules_between(operations),
                feed_forward_module("mlp", operations, self.ffn),
            ]
        )


class TemporalBlock(Block):
    """A block that attends across frames, each token to those of its position."""

    def settled(self, operations: PassOperations) -> BlockForward:
        """Returns the function that computes the block by these operations, with all weights looked up."""
        attended = self.attn.settled(operations)

        def across_frames(x_BTD: Tensor, layer: int, step: SpatioTemporalPass, kept: int | None) -> Tensor:
            x_NQD = step.to_tokens(layer, x_BTD.view(len(x_BTD), -1, step.tokens, x_BTD.shape[-1]))
            return step.to_frames(layer, attended(x_NQD, partial(step.attend, layer))).flatten(1, 2)

        return settled_block(
            [
                attention_module("temporal", operations, across_frames),
                *self.modules_between(operations),
                feed_forward_module("temporal-mlp", operations, self.ffn),
            ]
        )


class SpatioTemporalDiT(nn.Module, ABC):
    """A DiT of alternating blocks. A token holds its patch as (patch height, patch width, channel).

    Args:
        spatial: the spatial block of every layer.
        temporal: the temporal block of every layer.
        dim: D.
        token_dim: the numbers of a token.
        text_dim: the width of the text embeddings.
        predicted_dim: the numbers that are predicted for a token.
        eps: the epsilon of the blocks' norms.
    """

    kinds: tuple[Kind, ...]  # the kinds of output that a layer has

    def __init__(
        self,
        spatial: Sequence[SpatialBlock],
        temporal: Sequence[TemporalBlock],
        dim: int,
        token_dim: int,
        text_dim: int,
        predicted_dim: int,
        eps: float,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.patch_embedding = nn.Linear(token_dim, dim)
        self.text_embedding = nn.Sequential(nn.Linear(text_dim, dim), nn.GELU("tanh"), nn.Linear(dim, dim))
        self.time_embedding = timestep_mlp(dim)
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.spatial, self.temporal = nn.ModuleList(spatial), nn.ModuleList(temporal)
        self.head_modulation = modulation_table(2, dim)
        self.head = nn.Linear(dim, predicted_dim)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return self.head.weight.dtype

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.head.weight.device

    @property
    def blocks(self) -> list[SpatialBlock | TemporalBlock]:
        """The blocks in the order in which they run."""
        return [block for layer in zip(self.spatial, self.temporal, strict=True) for block in layer]  # type: ignore[misc]

    def settled(self, operations: PassOperations) -> SettledModel:
        """Settles for all passes of a stream by which operations and with which weights the model is computed."""
        return SettledModel([block.settled(operations) for block in self.blocks], linear(self.head, operations))

    def modulated(self, time_FD: Tensor) -> PassModulation:
        """Computes what blocks and head take from embedded timesteps, (F, D)."""
        time_F6D = self.time_projection(time_FD).unflatten(-1, (6, -1))
        tables = torch.stack([block.modulation for block in self.blocks])
        return modulate(time_FD, time_F6D, tables, self.head_modulation, self.eps, HEAD_EPS)

    def forward(self, tokens_BFSE: Tensor, step: SpatioTemporalPass) -> Tensor:
        """Runs one pass.

        Args:
            tokens_BFSE: the tokens of this rank's frames.
            step: the pass.

        Returns:
            The prediction for every token, (B, F, S, predicted_dim).
        """
        x_BTD = (self.patch_embedding(tokens_BFSE) + step.position_SD).flatten(1, 2)
        normed = torch.empty_like(x_BTD) if step.operations.in_place else None
        residual = Residual(wide(x_BTD) if x_BTD.device.type == "cpu" else x_BTD)
        for number, (block, modulation) in enumerate(zip(step.settled.blocks, step.modulation.blocks, strict=True)):
            residual = block(residual, modulation, number // 2, step, normed, None)
            if number == 0 and step.time_FD is not None:
                x_BFSD = residual.sum().unflatten(1, (-1, step.tokens))
                residual = Residual((x_BFSD + step.time_FD.unsqueeze(-2)).flatten(1, 2))
        normed_BTD = step.operations.add_norm(*residual, step.modulation.head)[1]
        return step.settled.head(normed_BTD).unflatten(1, (-1, step.tokens))


def timestep_mlp(dim: int) -> nn.Sequential:
    """Returns the two layers that embed the sinusoids of a timestep, or of another number."""
    return nn.Sequential(nn.Linear(FREQUENCIES, dim), nn.SiLU(), nn.Linear(dim, dim))
