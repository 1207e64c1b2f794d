"""The Video Interface Network (arXiv 2503.17539): it condenses keyframes of the whole noisy video into a few global
tokens, and these into keys and values that every chunk attends in addition to its own, in each layer of the DiT.

    read     One cross-attention of the learned tokens over the keyframes' tokens; its cost is linear in the length of
             the video. Values depend on the tokens alone, keys on their position and the noise level too. The output is
             normalized.
    process  Self-attention blocks over global tokens and text.
    output   A linear layer for each layer of the DiT makes one key and one value of each global token. Keys are not
             rotated; a chunk selects what concerns its own time and position by its queries, which are rotated.

The paper does not say how the DiT takes the global tokens ("[X_i, Z]"), nor at which position. If they passed through
the DiT with every chunk, each chunk would pay for them in all layers; their keys and values are computed once a step.

The read can be distributed: `keyframes` and `queries` return what a rank attends, the caller merges the partial
outputs, and `globals` takes the merged one.

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
    """The projections of an attention. Queries and keys are normalized by RMSNorms over all heads, as in the DiT;
    values may come from another input than keys, of the width `value_dim`."""

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
        """Returns the queries, (B, T, H, d)."""
        return rms_norm(self.q(x_BTD), self.norm_q.weight, self.eps).unflatten(-1, (self.heads, -1))

    def keys(self, keys_from_BTD: Tensor, values_from_BTV: Tensor) -> Keys:
        """Returns the keys and the values, each (B, T, H, d)."""
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
    """A VIN of any size for a DiT of any size.

    Args:
        config: sizes of the VIN.
        dit: sizes of the DiT that attends the global tokens.
    """

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
        """The dtype of the parameters and of the forward."""
        return self.z_init.dtype

    def time(self, timesteps_B: Tensor) -> Tensor:
        """Embeds the noise level of a video, a timestep in [0, 1000]; returns (B, 1, D)."""
        return self.embed_time(sinusoid(timesteps_B, self.dit.freq_dim).to(self.dtype)).unsqueeze(1)

    def keyframes(self, tokens_BKSE: Tensor, positions_KS3: Tensor, time_B1D: Tensor) -> Keys:
        """Projects the noisy tokens of keyframes to the keys and values of the read.

        Only keys contain position and noise level: averaged over many tokens these would outweigh the faint signal in
        the values.

        Args:
            tokens_BKSE: the noisy tokens.
            positions_KS3: global time index, row and column of each token.
            time_B1D: what `time` returns.

        Returns:
            Keys and values, (B, K·s, H, d).
        """
        tokens = tokens_BKSE.flatten(1, 2).to(self.dtype)
        position = self.embed_place(sinusoid(positions_KS3, self.dit.freq_dim).flatten(2).to(self.dtype)).flatten(0, 1)
        return self.read.keys(self.norm_tokens(self.embed_token(tokens) + position + time_B1D), tokens)

    def queries(self, time_B1D: Tensor) -> Tensor:
        """Returns the queries of the read, (B, G, H, d)."""
        return self.read.queries(self.norm_z(self.z_init + time_B1D))

    def globals(self, read_BGHd: Tensor, embeds_BLW: Tensor, time_B1D: Tensor, backend: str = "auto") -> list[Keys]:
        """Computes the keys and values that chunks attend.

        The output of the read is normalized, since a mean of noise becomes smaller with the number of tokens.

        Args:
            read_BGHd: the merged output of the read.
            embeds_BLW: text embeddings.
            time_B1D: what `time` returns.
            backend: of the attention in the blocks.

        Returns:
            Keys and values layer by layer, (B, G, heads of the DiT, head width of the DiT).
        """
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


def positions(times: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Returns the position of every token of some frames.

    Args:
        times: global time indices of the frames, (K,).
        rows: of the tokens of a frame, (s,).
        columns: of the tokens of a frame, (s,).

    Returns:
        (K, s, 3): global time index, row and column.
    """
    spatial = torch.stack([rows, columns], -1).expand(len(times), -1, -1)
    return torch.cat([times.view(-1, 1, 1).expand(-1, len(rows), 1), spatial], -1)


SIZES = ("dim", "num_heads", "num_layers", "text_dim", "freq_dim", "in_channels", "patch_size")


def sizes(dit: DiTConfig) -> dict[str, object]:
    """Returns the sizes of a DiT that a VIN depends on, as JSON returns them: lists in place of tuples."""
    return {name: list(x) if isinstance(x := getattr(dit, name), tuple) else x for name in SIZES}


def differing(one: DiTConfig, other: DiTConfig) -> list[str]:
    """Returns one phrase for each of these sizes in which two DiTs differ; `one` is named first."""
    others = sizes(other)
    return [f"{name} {x}, not {others[name]}" for name, x in sizes(one).items() if x != others[name]]
