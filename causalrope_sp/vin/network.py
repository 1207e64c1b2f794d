"""The Video Interface Network: keyframes of the whole noisy video into a few global tokens, and those into keys and
values that every chunk attends beside its own, layer by layer of the DiT.

    read       one cross-attention of the learned tokens over the keyframes' tokens: linear in the video's length;
               values are of the tokens alone, keys of their place and the noise level too; what was read is normed
    process    self-attention blocks over global tokens and text
    hand over  a key and a value a global token for each of the DiT's layers, unrotated: a chunk finds what concerns its
               own time and place by its queries, which are rotated

The paper leaves open how the DiT takes the global tokens ("[X_i, Z]") and where they stand. Passing through the DiT
beside every chunk they would cost each chunk a share of all its layers; keys and values are computed once a step.

The read goes over tokens of any rank: `keyframes` and `queries` give what a rank attends, partial results are merged by
whoever calls, and `globals` goes on from the merged one.

Shapes: B batch, K keyframes, s tokens of a frame on this rank, E numbers in a token, G global tokens, D VIN width,
H VIN heads, d head width, L text tokens, W text width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from causalrope_kernels import Keys, attention, linear_gelu, rms_norm
from causalrope_sp.config import DiTConfig
from causalrope_sp.models.causal_dit import sinusoid
from causalrope_sp.vin.vin_config import VINConfig


class Attention(nn.Module):
    """Queries of one sequence on keys of another, both normed by head-spanning RMSNorms as the DiT's are. Values may
    come from something else than keys, of another width."""

    def __init__(self, config: VINConfig, eps: float, value_dim: int | None = None) -> None:
        super().__init__()
        self.heads, self.eps = config.heads, eps
        self.q = nn.Linear(config.dim, config.dim)
        self.k = nn.Linear(config.dim, config.dim)
        self.v = nn.Linear(value_dim or config.dim, config.dim, bias=False)
        self.norm_q = nn.RMSNorm(config.dim, eps)
        self.norm_k = nn.RMSNorm(config.dim, eps)
        self.out = nn.Linear(config.dim, config.dim)

    def queries(self, x_BTD: Tensor) -> Tensor:
        return rms_norm(self.q(x_BTD), self.norm_q.weight, self.eps).unflatten(-1, (self.heads, -1))

    def keys(self, keys_from_BTD: Tensor, values_from_BTV: Tensor) -> Keys:
        k = rms_norm(self.k(keys_from_BTD), self.norm_k.weight, self.eps)
        return Keys(k.unflatten(-1, (self.heads, -1)), self.v(values_from_BTV).unflatten(-1, (self.heads, -1)))


class Block(nn.Module):
    """Self-attention and a feed-forward of four times the width, each after a LayerNorm."""

    def __init__(self, config: VINConfig, eps: float) -> None:
        super().__init__()
        self.norm_1 = nn.LayerNorm(config.dim, eps)
        self.attention = Attention(config, eps)
        self.norm_2 = nn.LayerNorm(config.dim, eps)
        self.up = nn.Linear(config.dim, 4 * config.dim)
        self.down = nn.Linear(4 * config.dim, config.dim)

    def forward(self, x_BTD: Tensor, backend: str) -> Tensor:
        normed = self.norm_1(x_BTD)
        found = attention(self.attention.queries(normed), self.attention.keys(normed, normed), backend)
        x_BTD = x_BTD + self.attention.out(found.flatten(2))
        return x_BTD + self.down(linear_gelu(self.norm_2(x_BTD), self.up.weight, self.up.bias))


class VideoInterfaceNetwork(nn.Module):
    """A VIN of any size beside a DiT of any size."""

    def __init__(self, config: VINConfig, dit: DiTConfig) -> None:
        super().__init__()
        self.config, self.dit = config, dit
        dim, eps = config.dim, dit.eps
        self.z_init = nn.Parameter(torch.randn(config.global_tokens, dim) / dim**0.5)
        self.embed_token = nn.Linear(dit.token_dim, dim, bias=False)
        self.embed_place = nn.Linear(3 * dit.freq_dim, dim)
        self.embed_text = nn.Linear(dit.text_dim, dim)
        self.embed_time = nn.Sequential(nn.Linear(dit.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.norm_tokens = nn.LayerNorm(dim, eps)
        self.norm_z = nn.LayerNorm(dim, eps)
        self.read = Attention(config, eps, dit.token_dim)
        self.norm_read = nn.RMSNorm(dim, eps)
        self.blocks = nn.ModuleList(Block(config, eps) for _ in range(config.layers))
        self.norm_out = nn.LayerNorm(dim, eps)
        self.hand_over = nn.ModuleList(nn.Linear(dim, 2 * dit.dim) for _ in range(dit.num_layers))
        self.norm_k = nn.ModuleList(nn.RMSNorm(dit.dim, eps) for _ in range(dit.num_layers))

    @property
    def dtype(self) -> torch.dtype:
        return self.z_init.dtype

    def time(self, timesteps_B: Tensor) -> Tensor:
        """The embedding of the noise level of a video, timesteps in [0, 1000]: (B, 1, D)."""
        return self.embed_time(sinusoid(timesteps_B, self.dit.freq_dim).to(self.dtype)).unsqueeze(1)

    def keyframes(self, tokens_BKSE: Tensor, places_KS3: Tensor, time_B1D: Tensor) -> Keys:
        """Keys and values of keyframes' noisy tokens, (B, K·s, H, d). `places_KS3` holds each token's global time
        index, row and column.

        Only keys contain place and time: averaged over many tokens they would outweigh the faint signal in the values.
        """
        tokens = tokens_BKSE.flatten(1, 2).to(self.dtype)
        where = self.embed_place(sinusoid(places_KS3, self.dit.freq_dim).flatten(2).to(self.dtype)).flatten(0, 1)
        return self.read.keys(self.norm_tokens(self.embed_token(tokens) + where + time_B1D), tokens)

    def queries(self, time_B1D: Tensor) -> Tensor:
        """The queries of the read, (B, G, H, d)."""
        return self.read.queries(self.norm_z(self.z_init + time_B1D))

    def globals(self, read_BGHd: Tensor, embeds_BLW: Tensor, time_B1D: Tensor, backend: str = "auto") -> list[Keys]:
        """From what the queries read to the keys and values that chunks attend, (B, G, H', d') in the DiT's own heads,
        layer by layer. What was read is normed: a mean of noise is the smaller, the more tokens there are."""
        read_BGD = rms_norm(read_BGHd.flatten(2), self.norm_read.weight, self.dit.eps)
        z = self.z_init + time_B1D + self.read.out(read_BGD)
        x = torch.cat([z, self.embed_text(embeds_BLW.to(self.z_init))], 1)
        for block in self.blocks:
            x = block(x, backend)
        z = self.norm_out(x[:, : self.config.global_tokens])
        found = []
        for linear, norm in zip(self.hand_over, self.norm_k, strict=True):
            k, v = linear(z).chunk(2, -1)
            assert isinstance(norm, nn.RMSNorm)
            k = rms_norm(k, norm.weight, self.dit.eps)
            found.append(Keys(*(x.unflatten(-1, (self.dit.num_heads, -1)) for x in (k, v))))
        return found


def places(times: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """(K, s, 3): global time index, row and column of the tokens at (rows, columns), (s,), of frames at `times`."""
    where = torch.stack([rows, columns], -1).expand(len(times), -1, -1)
    return torch.cat([times.view(-1, 1, 1).expand(-1, len(rows), 1), where], -1)


SIZES = ("dim", "num_heads", "num_layers", "text_dim", "freq_dim", "in_channels", "patch_size")


def sizes(dit: DiTConfig) -> dict[str, object]:
    """Those of a DiT that a VIN depends on, as JSON gives them back."""
    return {name: list(x) if isinstance(x := getattr(dit, name), tuple) else x for name in SIZES}


def differing(one: DiTConfig, other: DiTConfig) -> list[str]:
    """In which of these sizes two DiTs differ, in words."""
    there = sizes(other)
    return [f"{name} {x}, not {there[name]}" for name, x in sizes(one).items() if x != there[name]]
