"""The Video Interface Network (arXiv 2503.17539): it condenses keyframes of the whole noisy video into a few global
tokens, and these into keys and values that every chunk attends in addition to its own, in each layer of the DiT.

    ask      One self-attention block over the learned tokens and the text, so that they look for what it names.
    read     One cross-attention of these over the keyframes' tokens; its cost is linear in the length of the video.
             Values depend on the tokens alone. Keys depend on the noise level, too, and on the embedded position, which
             has attended the text: it knows what the text says of that position. It is computed once a video. The
             output is normalized.
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

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from causalrope_kernels import Keys, attention, linear_gelu, rms_norm
from causalrope_sp.config import DiTConfig
from causalrope_sp.models.causal_dit import sinusoid
from causalrope_sp.vin.vin_config import VINConfig

AT_ONCE = 4096  # positions are embedded at a time, which bounds the memory


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
    """Attention and a feed-forward of four times the width, each after a LayerNorm. It is self-attention unless the
    keys and values of something else are given."""

    def __init__(self, config: VINConfig, eps: float) -> None:
        super().__init__()
        self.norm_1 = nn.LayerNorm(config.dim, eps)
        self.attention = Attention(config, eps)
        self.norm_2 = nn.LayerNorm(config.dim, eps)
        self.up = nn.Linear(config.dim, 4 * config.dim)
        self.down = nn.Linear(4 * config.dim, config.dim)

    def forward(self, x_BTD: Tensor, backend: str, keys: Keys | None = None) -> Tensor:
        normed = self.norm_1(x_BTD)
        keys = self.attention.keys(normed, normed) if keys is None else keys
        found = attention(self.attention.queries(normed), keys, backend)
        x_BTD = x_BTD + self.attention.out(found.flatten(2))
        return x_BTD + self.down(linear_gelu(self.norm_2(x_BTD), self.up.weight, self.up.bias))


@dataclass(frozen=True)
class ReadState:
    """What a step of a video reads with.

    Args:
        z_BGD: the learned tokens, which have attended the text.
        text_BLD: the text, which has attended them.
        time_B1D: the embedded noise level.
    """

    z_BGD: Tensor
    text_BLD: Tensor
    time_B1D: Tensor


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
        wide = at_least_float32(torch.get_default_dtype())
        self.frequencies = nn.Parameter(torch.randn(3, dim // 2, dtype=wide))  # radians a frame, a row and a column
        self.embed_position = nn.Sequential(nn.Linear(2 * (dim // 2), dim), nn.SiLU(), nn.Linear(dim, dim))
        self.embed_text = nn.Sequential(nn.Linear(dit.text_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.embed_time = nn.Sequential(nn.Linear(dit.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.ask_block = Block(config, eps)
        self.position_blocks = nn.ModuleList(Block(config, eps) for _ in range(config.position_layers))
        self.norm_tokens = nn.LayerNorm(dim, eps)
        self.norm_z = nn.LayerNorm(dim, eps)
        self.read = Attention(config, eps, dit.token_dim)
        self.norm_read = nn.RMSNorm(dim, eps)
        self.blocks = nn.ModuleList(Block(config, eps) for _ in range(config.layers))
        self.norm_out = nn.LayerNorm(dim, eps)
        self.hand_over = nn.ModuleList(nn.Linear(dim, 2 * dit.dim) for _ in range(dit.num_layers))
        self.norm_k = nn.ModuleList(nn.RMSNorm(dit.dim, eps) for _ in range(dit.num_layers))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> VideoInterfaceNetwork:
        """Moves and casts, but keeps the frequencies in float32 or wider: in bfloat16 a position 500 latent frames on
        would be off by most of a radian."""
        kept = self.frequencies.data
        super()._apply(fn, recurse)
        wide = at_least_float32(self.frequencies.dtype)
        if self.frequencies.dtype != wide:
            self.frequencies.data = kept.to(self.frequencies.device, wide)
            if self.frequencies.grad is not None:
                self.frequencies.grad = self.frequencies.grad.to(wide)
        return self

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the parameters and of the forward."""
        return self.z_init.dtype

    def text(self, embeds_BLW: Tensor) -> Tensor:
        """Embeds the text, once a video.

        Args:
            embeds_BLW: text embeddings.

        Returns:
            (B, L, D).
        """
        return self.embed_text(embeds_BLW.to(self.dtype))

    def position_embeddings(self, positions_KS3: Tensor, text_BLD: Tensor, backend: str = "auto") -> Tensor:
        """Embeds the positions of keyframes' tokens and lets them attend the text, once a video.

        A position is waves of learned frequencies over time, rows and columns together (learnable Fourier features, Li
        et al., arXiv 2106.02795, section 3), so that one of them can follow a motion.

        Args:
            positions_KS3: global time index, row and column of each token.
            text_BLD: what `text` returns.
            backend: of the attention to the text.

        Returns:
            (B, K·s, D).
        """
        keys, found = list[Keys](), list[Tensor]()
        for block in self.position_blocks:
            assert isinstance(block, Block)
            keys.append(block.attention.keys(text_BLD, text_BLD))
        for positions_T3 in positions_KS3.flatten(0, 1).split(AT_ONCE):
            angles = positions_T3.double() @ self.frequencies.double()
            waves = torch.cat([angles.cos().to(self.dtype), angles.sin().to(self.dtype)], -1)
            embedded = self.embed_position(waves).expand(len(text_BLD), -1, -1)
            for block, of_text in zip(self.position_blocks, keys, strict=True):
                embedded = block(embedded, backend, of_text)
            found.append(embedded)
        return torch.cat(found, 1)

    def ask(self, text_BLD: Tensor, timesteps_B: Tensor, backend: str = "auto") -> ReadState:
        """Lets the learned tokens and the text attend one another, before the read.

        Args:
            text_BLD: what `text` returns.
            timesteps_B: the noise level of each video, a timestep in [0, 1000].
            backend: of the attention.

        Returns:
            What the other methods take.
        """
        time_B1D = self.embed_time(sinusoid(timesteps_B, self.dit.freq_dim).to(self.dtype)).unsqueeze(1)
        x = self.ask_block(torch.cat([self.z_init + time_B1D, text_BLD], 1), backend)
        return ReadState(x[:, : self.config.global_tokens], x[:, self.config.global_tokens :], time_B1D)

    def keyframes(self, tokens_BKSE: Tensor, positions_BTD: Tensor, state: ReadState) -> Keys:
        """Projects the noisy tokens of keyframes to the keys and values of the read.

        Only keys contain position and noise level: averaged over many tokens these would outweigh the faint signal in
        the values.

        Args:
            tokens_BKSE: the noisy tokens.
            positions_BTD: what `position_embeddings` returns, T = K·s.
            state: what `ask` returns.

        Returns:
            Keys and values, (B, K·s, H, d).
        """
        tokens = tokens_BKSE.flatten(1, 2).to(self.dtype)
        return self.read.keys(self.norm_tokens(self.embed_token(tokens) + positions_BTD + state.time_B1D), tokens)

    def queries(self, state: ReadState) -> Tensor:
        """Computes the queries of the read.

        Args:
            state: what `ask` returns.

        Returns:
            (B, G, H, d).
        """
        return self.read.queries(self.norm_z(state.z_BGD))

    def process(self, read_BGHd: Tensor, state: ReadState, backend: str = "auto") -> Tensor:
        """Computes the global tokens from what was read.

        The output of the read is normalized, since a mean of noise becomes smaller with the number of tokens.

        Args:
            read_BGHd: the merged output of the read.
            state: what `ask` returns.
            backend: of the attention in the blocks.

        Returns:
            The global tokens, (B, G, D).
        """
        read_BGD = rms_norm(read_BGHd.flatten(2), self.norm_read.weight, self.dit.eps)
        x = torch.cat([state.z_BGD + self.read.out(read_BGD), state.text_BLD], 1)
        for block in self.blocks:
            x = block(x, backend)
        return self.norm_out(x[:, : self.config.global_tokens])

    def keys_of_layers(self, z_BGD: Tensor) -> list[Keys]:
        """Computes the keys and values that chunks attend.

        Args:
            z_BGD: the global tokens, what `process` returns.

        Returns:
            Keys and values layer by layer, (B, G, heads of the DiT, head width of the DiT).
        """
        found = []
        for linear, norm in zip(self.hand_over, self.norm_k, strict=True):
            k, v = linear(z_BGD).chunk(2, -1)
            assert isinstance(norm, nn.RMSNorm)
            k = rms_norm(k, norm.weight, self.dit.eps)
            found.append(Keys(*(x.unflatten(-1, (self.dit.num_heads, -1)) for x in (k, v))))
        return found


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """The dtype of a VIN's frequencies."""
    return torch.promote_types(dtype, torch.float32)


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
