"""The causal DiT: Wan 2.1's text-to-video transformer over the tokens of one pass.

The model receives one object that describes the pass and knows nothing of ranks: self-attention calls
`ForwardPass.attend`, which the caller binds to a cache and an attention strategy.

Shapes: B batch, F frames of the pass, s tokens of a frame that this rank owns, T = F·s, E numbers in a token,
D model width, H heads, d head width, L text tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from causalrope_kernels import PassOperations
from causalrope_kernels.arguments import Norm
from causalrope_kernels.reference import wide
from causalrope_sp.checks import check_whole
from causalrope_sp.config import DiTConfig
from causalrope_sp.devices import on_meta
from causalrope_sp.models.block import Block, CrossAttention, ForwardPass, TextContext
from causalrope_sp.models.modulation import PassModulation, modulate, modulation_table
from causalrope_sp.models.parts import Residual, SettledModel, linear


class Head(nn.Module):
    """The output head: a modulated LayerNorm and a linear layer to the numbers of a token."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.modulation = modulation_table(2, config.dim)
        self.linear = nn.Linear(config.dim, config.token_dim)

    def forward(
        self, residual: Residual, norm: Norm, compute: Callable[[Tensor], Tensor], operations: PassOperations
    ) -> Tensor:
        """Computes the velocity of the tokens, (B, T, E), from the residual, the norm of their frames and the function
        of the linear layer."""
        normed = operations.add_norm(residual.x_BTD, residual.branch_BTD, residual.gate, norm)[1]
        return compute(normed)


class CausalDiT(nn.Module):
    """Wan 2.1's text-to-video transformer at any size. A token holds its patch as (patch height, patch width, channel).

    A model with `control_channels` reads them behind the channels of the latents, as the control models of Wan-Fun
    (github.com/aigc-apps/VideoX-Fun) and Wan 2.2's image-to-video models do. Its patch embedding is the sum of one of
    the latents and one of the control, so the control is what is added to the tokens.

    Time embedding, modulation tables and the norm before cross-attention may be float32 in a model of 16 bits, which
    then casts the embedded timesteps alone: the operations on the others compute in float32 anyway.

    Args:
        config: the sizes of the model.
    """

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.dim
        self.patch_embedding = nn.Linear(config.embedded_dim, dim)
        self.text_embedding = nn.Sequential(nn.Linear(config.text_dim, dim), nn.GELU("tanh"), nn.Linear(dim, dim))
        if config.image_dim:
            self.image_embedding = image_embedding(config.image_dim, dim)
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

    @property
    def first_block(self) -> Block:
        """The first block."""
        return cast(Block, self.blocks[0])

    def with_control(self, channels: int) -> CausalDiT:
        """Returns a model that takes so many channels of control more and shares all other parameters with this one.

        Their weights are zero, so that it computes what this model computes until they are trained.

        Args:
            channels: how many.

        Raises:
            ConfigError: there are fewer than 1.
        """
        own, added = self.config, check_whole("channels", channels)
        with on_meta():
            wider = CausalDiT(replace(own, control_channels=own.control_channels + added))
        state = self.state_dict()
        weight = state["patch_embedding.weight"].unflatten(1, (-1, own.embedded_channels))
        state["patch_embedding.weight"] = nn.functional.pad(weight, (0, added)).flatten(1)
        wider.load_state_dict(state, assign=True)
        return wider.train(self.training).requires_grad_(self.patch_embedding.weight.requires_grad)

    def _cross_attentions(self) -> Iterator[CrossAttention]:
        return (module for module in self.modules() if isinstance(module, CrossAttention))

    def encode_text(self, embeds_BLE: Tensor, image_BNI: Tensor | None = None) -> TextContext:
        """Computes the keys and values of every layer's cross-attention, once per prompt.

        Args:
            embeds_BLE: the embeddings of the text, (B, text_len, text_dim), with zeros after the end of the text.
            image_BNI: image tokens, (B, N, image_dim), of a model that has them; None for another model.

        Returns:
            The keys and values, layer by layer.
        """
        text = self.text_embedding(embeds_BLE.to(self.device, self.dtype))
        image = None if image_BNI is None else self._embed_image(image_BNI.to(self.device))
        return [cross_attn.keys(text, image) for cross_attn in self._cross_attentions()]

    def _embed_image(self, image_BNI: Tensor) -> Tensor:
        """Embeds image tokens, (B, N, D); norms compute in float32 or wider, whatever the model's dtype."""
        norm_1, up, gelu, down, norm_2 = self.image_embedding
        hidden = down(gelu(up(_layer_norm(image_BNI, norm_1).to(self.dtype))))
        return _layer_norm(hidden, norm_2).to(self.dtype)

    def forward(self, tokens_BTE: Tensor, step: ForwardPass) -> Tensor:
        """Computes the velocity of the last frames of a pass.

        Args:
            tokens_BTE: this rank's tokens of all frames of the pass, with their control, if the model takes one.
            step: the pass.

        Returns:
            The velocity of this rank's tokens of the last `step.predicted_frames` frames, (B, s·predicted_frames, E).
        """
        modulation = step.modulation or self.modulation(step.timesteps_F)
        x_BTD = self.patch_embedding(tokens_BTE)
        normed = torch.empty_like(x_BTD) if step.operations.in_place else None
        residual = Residual(wide(x_BTD) if x_BTD.device.type == "cpu" else x_BTD)
        blocks, compute_head = step.settled or self.settled(step.operations)
        modulations, norm, kept = modulation.blocks, modulation.head, None
        if step.predicted_frames < step.frames:  # of the other frames the last block needs keys and values alone
            kept = x_BTD.shape[1] * step.predicted_frames // step.frames
            groups = max(1, step.timesteps_F.shape[-1] * step.predicted_frames // step.frames)
            last, norm = modulation.last(groups)
            modulations = [*modulations[:-1], last]
        for layer, (block, vectors) in enumerate(zip(blocks, modulations, strict=True)):
            residual = block(residual, vectors, layer, step, normed, kept if layer == len(blocks) - 1 else None)
        return self.head(residual, norm, compute_head, step.operations)

    def settled(self, operations: PassOperations) -> SettledModel:
        """Settles for all passes of a stream by which operations and with which weights the model is computed.

        Args:
            operations: the operations between the matrix products.

        Returns:
            Functions of blocks and head. They keep the weights of now: a weight that is replaced later is not seen.
        """
        blocks = [cast(Block, block).settled(operations) for block in self.blocks]
        return SettledModel(blocks, linear(self.head.linear, operations))

    def modulation(self, timesteps_F: Tensor) -> PassModulation:
        """Computes what blocks and head take from timesteps: their shifts, factors and gates.

        Args:
            timesteps_F: the timesteps in [0, 1000], (F,), or (B, F) where batch entries differ.
        """
        waves = sinusoid(timesteps_F, self.config.freq_dim).to(next(self.time_embedding.parameters()).dtype)
        time_FD = self.time_embedding(waves).to(self.dtype)  # its weights may be float32 where the model's are not
        time_F6D = self.time_projection(time_FD).unflatten(-1, (6, -1))
        tables_L6D = torch.stack([cast(Block, block).modulation for block in self.blocks])
        eps = self.config.eps
        return modulate(time_FD, time_F6D, tables_L6D, self.head.modulation, eps, eps)


def image_embedding(image_dim: int, dim: int) -> nn.Sequential:
    """The weights of Wan's embedding of image tokens: a norm, two linear layers with GELU between them, a norm."""
    return nn.Sequential(
        nn.LayerNorm(image_dim),
        nn.Linear(image_dim, image_dim),
        nn.GELU(),
        nn.Linear(image_dim, dim),
        nn.LayerNorm(dim),
    )


def _layer_norm(x: Tensor, norm: nn.Module) -> Tensor:
    """Norms in float32 or wider."""
    assert isinstance(norm, nn.LayerNorm), "image_embedding begins and ends with one"
    x = wide(x)
    weight, bias = (wide(each).to(x.dtype) for each in (norm.weight, norm.bias))
    return nn.functional.layer_norm(x, norm.normalized_shape, weight, bias, norm.eps)


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
