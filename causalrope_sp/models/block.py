"""The blocks of the causal DiT: their weights, and the functions that compute them for all passes of a stream.

Shapes: B batch, F frames of the pass, s tokens of a frame that this rank owns, T = F·s, D model width, H heads, d head
width, L text tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor, nn

from causalrope_kernels import Affine, Keys, PassOperations, Projection, Rotation, rms_norm
from causalrope_sp.config import DiTConfig
from causalrope_sp.models.modulation import PassModulation, modulation_table
from causalrope_sp.models.parts import (
    BlockForward,
    FeedForward,
    SettledModel,
    TextAttention,
    attention_module,
    feed_forward_module,
    linear,
    settled_block,
    text_module,
)
from causalrope_sp.reuse.output_store import OutputOf, computed

Attend = Callable[[int, Projection], Tensor]


class ContextKeys(NamedTuple):
    """What a layer's cross-attention reads: the keys and values of the text, and of the image tokens if there are."""

    text: Keys
    image: Keys | None = None


TextContext = list[ContextKeys]  # one entry per layer


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
        output: takes a layer's number, the kind of a module ("self", "cross" or "mlp"), a function that computes its
            output, and the gate of that output. It returns that output, or the stored output of an earlier pass
            (`reuse`), and the gate that is still to be applied.
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

    @property
    def timestep(self) -> float | None:
        """The timestep of the frames that are denoised; None in a context pass by itself."""
        return float(self.timesteps_F.flatten()[-1]) or None

    @property
    def denoised_tokens(self) -> int:
        """How many of the last tokens are denoised."""
        return self.predicted_frames * self.rotation.tokens


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


class CrossAttention(TextAttention):
    """The weights of attention on the text, with an RMSNorm of q and k over all of D. A model with image tokens attends
    them with the same queries and adds both results."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__(config.dim, config.num_heads)
        self.eps = config.eps
        self.norm_q = nn.RMSNorm(config.dim, config.eps)
        self.norm_k = nn.RMSNorm(config.dim, config.eps)
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

    def settled_queries(self, operations: PassOperations) -> Callable[[Tensor], Tensor]:
        """Returns the function that projects tokens to queries and norms them, (B, T, D)."""
        q, weight, eps, in_place = linear(self.q, operations), self.norm_q.weight, self.eps, operations.in_place
        rms_norm = operations.settled_rms_norm()

        def queries(x_BTD: Tensor) -> Tensor:
            q_BTD = q(x_BTD)
            return rms_norm(q_BTD, weight, eps, q_BTD if in_place else None)

        return queries

    def settled_attention(self, operations: PassOperations) -> Callable[..., Tensor]:
        """Returns the function of queries and the keys of text and image."""
        attention = operations.attention

        def attended(q_BTHD: Tensor, keys: ContextKeys, *, reuse_q: bool) -> Tensor:
            if keys.image is None:
                return attention(q_BTHD, keys.text, reuse_q=reuse_q)
            of_image = attention(q_BTHD, keys.image, reuse_q=False)
            return attention(q_BTHD, keys.text, reuse_q=reuse_q) + of_image

        return attended


class Block(nn.Module):
    """The weights of a block of Wan's DiT: self-attention, cross-attention and feed-forward, modulated by time."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.eps = config.eps
        self.modulation = modulation_table(6, config.dim)
        self.self_attn = SelfAttention(config)
        self.cross_norm = nn.LayerNorm(config.dim, config.eps)
        self.cross_attn = CrossAttention(config)
        self.ffn = FeedForward(config.dim, config.ffn_dim)

    def settled(self, operations: PassOperations) -> BlockForward:
        """Returns the function that computes the block by these operations, with all weights looked up."""
        cross_norm = Affine(self.cross_norm.weight, self.cross_norm.bias, self.eps)
        return settled_block(
            [
                attention_module("self", operations, self.self_attn.settled(operations)),
                text_module("cross", operations, self.cross_attn, cross_norm),
                feed_forward_module("mlp", operations, self.ffn),
            ]
        )
