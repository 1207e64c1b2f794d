"""The DiT's forward in training, packed and compiled: chart, clean frames and noisy chunks as one masked sequence.

The numbers are `CausalDiT`'s. What differs is for speed on a CPU: one attention over the whole sequence with a mask,
the two channels of a rotary pair apart (a permutation of the rows of q and k, which leaves q·k as it is), and a block
compiled as one. Shapes: B videos, F frames, S tokens a frame, T = F·S, E numbers in a token, D width, H heads, d head
width, L text tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

from causalrope_sp.models.causal_dit import Block, CausalDiT, sinusoid

from .dit import CHUNK, CONFIG, RING

HALF = torch.bfloat16
HEADS, WIDTH = CONFIG.num_heads, CONFIG.head_dim
_BY_HEAD = torch.arange(CONFIG.dim).view(HEADS, WIDTH)
APART = torch.cat([_BY_HEAD[:, 0::2], _BY_HEAD[:, 1::2]], 1).flatten()  # even channels of a head, then odd ones
QKV_APART = torch.cat([APART, CONFIG.dim + APART, torch.arange(2 * CONFIG.dim, 3 * CONFIG.dim)])


@cache
def mask(past: int, numbers: tuple[int, ...], tokens: int) -> Tensor:
    """What is added to the scores, (T, T): 0 where a token is seen. `past` frames are clean, the chart is the first;
    chunk n follows them n-th and stands at place `numbers[n]`."""
    frames = past + CHUNK * len(numbers)
    seen = torch.zeros(frames, frames, dtype=torch.bool)
    seen[:, 0] = True
    seen[0, 1:] = False
    for begin in range(1, past, CHUNK):
        stop = begin + CHUNK
        seen[begin:stop, max(1, stop - RING) : stop] = True
    for n, number in enumerate(numbers):
        begin, own = 1 + CHUNK * number, slice(past + CHUNK * n, past + CHUNK * (n + 1))
        seen[own, max(1, begin + CHUNK - RING) : begin] = True
        seen[own, own] = True
    by_token = seen.repeat_interleave(tokens, 0).repeat_interleave(tokens, 1)
    return torch.zeros(by_token.shape).masked_fill(~by_token, -1e30)


def velocity(
    model: CausalDiT,
    x_BFSE: Tensor,
    times_BF: Tensor,
    embeds: Tensor,
    angles: tuple[Tensor, Tensor],
    seen: Tensor,
    predicted: int,
) -> Tensor:
    """That of the last `predicted` frames, (B, F, S, E), float32. Timesteps in [0, 1000]; `angles` are cosines and
    sines, (B or 1, T, 1, d/2)."""
    time = model.time_embedding(sinusoid(times_BF, CONFIG.freq_dim).float())
    time_6 = model.time_projection(time).unflatten(-1, (6, -1))
    first, second = model.text_embedding[0], model.text_embedding[2]
    text = _linear(functional.gelu(_linear(embeds, first).float(), approximate="tanh"), second)
    x = _linear(x_BFSE, model.patch_embedding).float()
    for block in model.blocks:
        modulation = (time_6 + block.modulation).unsqueeze(3).unbind(2)
        x = _block(x, modulation, _weights(block), angles, seen, *_text_keys(block, text))
    shift, scale = ((time[:, -predicted:] + learned).unsqueeze(2) for learned in model.head.modulation)
    normed = functional.layer_norm(x[:, -predicted:], x.shape[-1:], eps=CONFIG.eps) * (1 + scale) + shift
    return _linear(normed, model.head.linear).float()


def _linear(x: Tensor, linear: torch.nn.Module) -> Tensor:
    return functional.linear(x.to(HALF), linear.weight.to(HALF), linear.bias.to(HALF))


def _weights(block: Block) -> list[Tensor]:
    """What `_block` takes, matrices in bfloat16."""
    own, cross, ffn = block.self_attn, block.cross_attn, block.ffn
    matrices = [own.qkv.weight[QKV_APART], own.qkv.bias[QKV_APART], own.out.weight, own.out.bias]
    matrices += [cross.q.weight, cross.q.bias, cross.out.weight, cross.out.bias]
    matrices += [ffn.up.weight, ffn.up.bias, ffn.down.weight, ffn.down.bias]
    vectors = [own.norm_q.weight[APART], own.norm_k.weight[APART], cross.norm_q.weight]
    return [m.to(HALF) for m in matrices] + vectors + [block.cross_norm.weight, block.cross_norm.bias]


def _text_keys(block: Block, text_BLD: Tensor) -> tuple[Tensor, Tensor]:
    k, v = _linear(text_BLD, block.cross_attn.kv).float().chunk(2, -1)
    k = _normed(k, block.cross_attn.norm_k.weight)
    return _by_head(k.to(HALF)), _by_head(v.to(HALF))


def _normed(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + CONFIG.eps) * weight


def _by_head(x_BTD: Tensor) -> Tensor:
    return x_BTD.reshape(len(x_BTD), -1, HEADS, WIDTH).transpose(1, 2)


@torch.compile(dynamic=False)
def _block(
    x_BFSD: Tensor,
    modulation: Sequence[Tensor],
    weights: Sequence[Tensor],
    angles: tuple[Tensor, Tensor],
    seen: Tensor,
    text_k: Tensor,
    text_v: Tensor,
) -> Tensor:
    shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = modulation
    qkv, qkv_bias, out, out_bias, cross, cross_bias, cross_out, cross_out_bias, up, up_bias, down, down_bias = weights[
        :12
    ]
    norm_q, norm_k, norm_cross, norm_weight, norm_bias = weights[12:]
    shape, (cos, sin), root = x_BFSD.shape, angles, WIDTH**-0.5

    def norm(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        return functional.layer_norm(x, shape[-1:], weight, bias, CONFIG.eps)

    def turned(x: Tensor, weight: Tensor) -> Tensor:
        x = _normed(x, weight).reshape(shape[0], -1, HEADS, WIDTH)
        even, odd = x.chunk(2, -1)
        return torch.cat([even * cos - odd * sin, even * sin + odd * cos], -1).to(HALF).transpose(1, 2)

    def attended(q: Tensor, k: Tensor, v: Tensor, added: Tensor | float) -> Tensor:
        scores = torch.matmul(q, k.transpose(-1, -2)).float() * root + added
        return torch.matmul(scores.softmax(-1).to(HALF), v).transpose(1, 2).reshape(shape)

    normed = (norm(x_BFSD) * (1 + scale_1) + shift_1).to(HALF)
    q, k, v = functional.linear(normed, qkv, qkv_bias).chunk(3, -1)
    a = attended(turned(q.float(), norm_q), turned(k.float(), norm_k), _by_head(v), seen)
    x = x_BFSD + functional.linear(a, out, out_bias).float() * gate_1
    q = functional.linear(norm(x, norm_weight, norm_bias).to(HALF), cross, cross_bias).float()
    a = attended(_by_head(_normed(q, norm_cross).to(HALF)), text_k, text_v, 0.0)
    x = x + functional.linear(a, cross_out, cross_out_bias).float()
    normed = (norm(x) * (1 + scale_2) + shift_2).to(HALF)
    hidden = functional.gelu(functional.linear(normed, up, up_bias).float(), approximate="tanh")
    return x + functional.linear(hidden.to(HALF), down, down_bias).float() * gate_2
