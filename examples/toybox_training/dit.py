"""The DiT's forward in training: one block-causal sequence of the chart, clean history and noisy chunks, compiled.

It computes what `CausalDiT` does in a stream, in bfloat16, 1.4 times as fast as its modules: one masked attention over
the sequence, the two channels of a rotary pair apart, and the elementwise work fused by torch.compile.

Shapes: B videos, N noisy chunks, F frames of the sequence, S tokens a frame, G further keys that are not rotated, H
heads, d head width, D model width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from causalrope_kernels import Keys
from causalrope_sp.config import DiTConfig, SamplerConfig, StreamConfig
from causalrope_sp.grid import LatentGrid, Shard
from causalrope_sp.models.block import Block
from causalrope_sp.models.causal_dit import CausalDiT, sinusoid
from causalrope_sp.models.rope import RotaryTables
from causalrope_sp.toybox.chart import chart
from causalrope_sp.toybox.toybox_text import TEXT_DIM, TEXT_LEN

CONFIG = DiTConfig(dim=192, ffn_dim=768, num_heads=6, num_layers=6, text_dim=TEXT_DIM, text_len=TEXT_LEN, freq_dim=64)
CHUNK = 3
STREAM = StreamConfig(  # the chart, a chunk of its own, stays, and four chunks go round
    window=13, sink=1, chunk_frames=CHUNK, independent_first_frame=True
)
RING = 12
SAMPLER = SamplerConfig(steps=(1000, 750, 500, 250), shift=1.0)
LEVELS = torch.tensor(SAMPLER.steps) / 1000
BF16 = torch.bfloat16
torch._dynamo.config.recompile_limit = 32  # one compiled block for each shape of batch, with gradients and without


def new_model() -> CausalDiT:
    """The untrained DiT: it predicts zeros."""
    torch.manual_seed(0)
    model = CausalDiT(CONFIG)
    nn.init.zeros_(model.head.linear.weight)
    nn.init.zeros_(model.head.linear.bias)
    return model


@dataclass
class Batch:
    """What one step learns from.

    Clean history (B, F, C, X, X), the chart left out, whose first frame has the global time index `start` and whose
    chunks have `sizes` frames; and the chunks to predict, (B, N·CHUNK, C, X, X). Chunk n comes after the first
    `numbers[n]` chunks of the history. `objects` (B, N·CHUNK, X, X) is true where the target holds more than
    background; `weights_BN` is how much each chunk counts.
    """

    history: Tensor
    sizes: Sequence[int]
    target: Tensor
    objects: Tensor
    numbers: Sequence[int]
    levels_BN: Tensor
    embeds: Tensor
    start: int = 1
    weights_BN: Tensor = field(default_factory=lambda: torch.ones(()))


class TeacherForcing:
    """Predicts every noisy chunk of a batch, each token seeing what it will in a stream."""

    def __init__(self, grid: LatentGrid, device: torch.device) -> None:
        self.grid, self.device = grid, device
        self._rope = RotaryTables(CONFIG.head_dim, CONFIG.theta, Shard(grid), device, torch.float32)

    def velocity(self, model: CausalDiT, batch: Batch, noisy: Tensor) -> Tensor:
        """The velocity of the noisy chunks (B, N·CHUNK, C, X, X), float32."""
        still = _chart(*noisy.shape[2:], self.device).expand(len(noisy), -1, -1, -1, -1)
        history = torch.cat([still, batch.history], 1)
        past = history.shape[1]
        ends = [1 + sum(batch.sizes[:number]) for number in range(len(batch.sizes) + 1)]
        starts = [ends[number] for number in batch.numbers]
        tokens = torch.cat([self.grid.patchify(x) for x in (history, noisy)], 1)
        clean = batch.levels_BN.new_zeros(len(history), past)
        timesteps = torch.cat([clean, 1000 * batch.levels_BN.repeat_interleave(CHUNK, 1)], 1)
        frames = [*range(1, past), *(start + f for start in starts for f in range(CHUNK))]
        rotation = self._rope.rotation([0, *(batch.start - 1 + frame for frame in frames)]).of_queries
        mask = _mask(tuple(ends), tuple(starts), self.grid.tokens, self.device)
        velocity = forward(model, tokens, timesteps, batch.embeds, rotation, mask, noisy.shape[1])
        return self.grid.unpatchify(velocity)


@cache
def _chart(channels: int, height: int, width: int, device: torch.device) -> Tensor:
    return chart(1, channels, height, width).to(device)


@cache
def _mask(ends: tuple[int, ...], starts: tuple[int, ...], tokens: int, device: torch.device) -> Tensor:
    """What a token does not see, as -1e30 to add to its scores, (F·S, F·S)."""
    past = ends[-1]
    frames = past + CHUNK * len(starts)
    sees = torch.zeros(frames, frames, dtype=torch.bool)
    sees[:, 0] = True
    for begin, end in pairwise(ends):
        sees[begin:end, max(1, end - RING) : end] = True
    for own, begin in zip(range(past, frames, CHUNK), starts, strict=True):
        sees[own : own + CHUNK, max(1, begin + CHUNK - RING) : begin] = True
        sees[own : own + CHUNK, own : own + CHUNK] = True
    sees = sees.repeat_interleave(tokens, 0).repeat_interleave(tokens, 1)
    return torch.zeros(sees.shape).masked_fill(~sees, -1e30).to(device)


def _linear(x: Tensor, layer: nn.Linear) -> Tensor:
    return functional.linear(x.to(BF16), layer.weight.to(BF16), layer.bias.to(BF16)).float()


def forward(
    model: CausalDiT,
    tokens_BFSE: Tensor,
    timesteps_BF: Tensor,
    embeds: Tensor,
    rotation: tuple[Tensor, Tensor],
    mask: Tensor,
    predicted: int,
    further: Sequence[Keys] | None = None,
) -> Tensor:
    """Computes `CausalDiT.forward` for the last frames of a sequence.

    Args:
        model: the DiT.
        tokens_BFSE: the patches of all frames.
        timesteps_BF: the timestep of each frame.
        embeds: the text embeddings, (B, L, W).
        rotation: cosines and sines of every token.
        mask: what is added to the scores, (F·S, F·S + G): -1e30 where a token does not see another.
        predicted: for how many of the last frames the velocity is computed.
        further: the further keys and values of each layer, (B, G, H, d); None for G = 0.

    Returns:
        The velocity, (B, predicted, S, E), float32.
    """
    time = model.time_embedding(sinusoid(timesteps_BF, model.config.freq_dim).float())
    parts = model.time_projection(time).unflatten(-1, (6, 1, -1))
    x = _linear(tokens_BFSE, model.patch_embedding)
    first, _, second = model.text_embedding
    assert isinstance(first, nn.Linear)
    assert isinstance(second, nn.Linear)
    text = _linear(functional.gelu(_linear(embeds, first), approximate="tanh"), second)
    cos, sin = (table.unsqueeze(-2) for table in rotation)
    if x.is_cuda:  # compiling for every shape, as on a CPU, would take longer there than the steps
        _compile_once(((x, 2), (parts, 2), (text, 1), (cos, 1), (sin, 1), (mask, 2)))
    for layer, block in enumerate(model.blocks):
        assert isinstance(block, Block)
        keys = None if further is None else _further(further[layer])
        x = _block(x, parts, _weights(block), cos, sin, mask, text, keys, model.config.num_heads)
    shift, scale = ((time[:, -predicted:] + learned).unsqueeze(2) for learned in model.head.modulation)
    return _linear(functional.layer_norm(x[:, -predicted:], x.shape[-1:]) * (1 + scale) + shift, model.head.linear)


def _apart(x: Tensor, axis: int) -> Tensor:
    """The channels of a head in another order. A rotary pair is channels 2i and 2i + 1; here all first ones come before
    all second ones."""
    return x.unflatten(axis, (-1, 2)).transpose(axis, axis + 1).flatten(axis, axis + 1)


def _further(keys: Keys) -> list[Tensor]:
    """Further keys and values, (B, H, G, d)."""
    return [x.to(BF16).transpose(1, 2) for x in (_apart(keys.k, 3), keys.v)]


def _weights(block: Block) -> list[Tensor]:
    """What `_block` takes: norms and modulation, then weight and bias of each linear layer."""
    own, cross, ffn = block.self_attn, block.cross_attn, block.ffn
    norms = [own.norm_q.weight, own.norm_k.weight, block.cross_norm.weight, block.cross_norm.bias]
    linears = (own.qkv, own.out, cross.q, cross.kv, cross.out, ffn.up, ffn.down)
    products = [x for linear in linears for x in (linear.weight, linear.bias)]
    weights = [*norms, cross.norm_q.weight, cross.norm_k.weight, block.modulation, *products]
    # Detached, those of the model and of its average need one compiled block, not two.
    return weights if torch.is_grad_enabled() else [weight.detach() for weight in weights]


def _norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + CONFIG.eps) * weight


def _by_head(x: Tensor, heads: int) -> Tensor:
    return x.to(BF16).unflatten(-1, (heads, -1)).transpose(1, 2)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, heads: int) -> Tensor:
    first, second = x.unflatten(-1, (heads, -1)).chunk(2, -1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], -1).to(BF16).transpose(1, 2)


def _compile_once(tensors: Sequence[tuple[Tensor, int]]) -> None:
    """Has a compiled function take any size of so many first axes of its tensors."""
    for tensor, axes in tensors:
        torch._dynamo.maybe_mark_dynamic(tensor, list(range(axes)))


@torch.compile(dynamic=False)
def _block(
    x: Tensor,
    parts: Tensor,
    weights: list[Tensor],
    cos: Tensor,
    sin: Tensor,
    mask: Tensor,
    text: Tensor,
    further: list[Tensor] | None,
    heads: int,
) -> Tensor:
    """One block of the DiT, (B, F, S, D) float32, as `Block` defines it."""
    norm_q, norm_k, cross_weight, cross_bias, cross_norm_q, cross_norm_k, modulation, *products = weights
    pairs = list(zip(products[::2], products[1::2], strict=True))
    shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = (parts[:, :, n] + modulation[n] for n in range(6))
    width, scale = (x.shape[-1],), (x.shape[-1] // heads) ** -0.5

    def linear(y: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return functional.linear(y.to(BF16), weight.to(BF16), bias.to(BF16))

    def apart(rows: Tensor) -> Tensor:
        return _apart(rows.unflatten(0, (heads, -1)), 1).flatten(0, 1)

    def qkv(rows: Tensor) -> Tensor:
        q, k, v = rows.chunk(3)
        return torch.cat([apart(q), apart(k), v])

    def attend(q: Tensor, keys: Tensor, values: Tensor, hidden: Tensor | float) -> Tensor:
        scores = torch.matmul(q, keys.transpose(-1, -2)).float() * scale + hidden
        seen = torch.matmul(scores.softmax(-1).to(BF16), values)
        return seen.transpose(1, 2).reshape(x.shape)

    y = functional.layer_norm(x, width) * (1 + scale_1) + shift_1
    own_q, own_k, own_v = linear(y, *map(qkv, pairs[0])).flatten(1, 2).float().chunk(3, -1)
    own_q, own_k = (
        _rotate(_norm(z, apart(weight)), cos, sin, heads) for z, weight in ((own_q, norm_q), (own_k, norm_k))
    )
    own_v = _by_head(own_v, heads)
    if further is not None:
        own_k, own_v = torch.cat([own_k, further[0]], 2), torch.cat([own_v, further[1]], 2)
    x = x + linear(attend(own_q, own_k, own_v, mask), *pairs[1]).float() * gate_1
    y = functional.layer_norm(x, width, cross_weight, cross_bias)
    q = _by_head(_norm(linear(y, *pairs[2]).flatten(1, 2).float(), cross_norm_q), heads)
    text_k, text_v = linear(text, *pairs[3]).float().chunk(2, -1)
    text_k, text_v = _by_head(_norm(text_k, cross_norm_k), heads), _by_head(text_v, heads)
    x = x + linear(attend(q, text_k, text_v, 0.0), *pairs[4]).float()
    y = functional.layer_norm(x, width) * (1 + scale_2) + shift_2
    y = functional.gelu(linear(y, *pairs[5]).float(), approximate="tanh")
    return x + linear(y, *pairs[6]).float() * gate_2
