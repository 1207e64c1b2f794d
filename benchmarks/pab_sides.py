"""The Latte of random weights that pab_peers.py compares, its sampling, and diffusers' and cache-dit's reuse on it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import LatteTransformer3DModel, PyramidAttentionBroadcastConfig, apply_pyramid_attention_broadcast
from torch import Tensor, nn

from causalrope_sp import Chunk, LatentGrid
from causalrope_sp.reuse import Broadcast, ReusePolicy

HEADS, WIDTH, LAYERS, TEXT, TEXT_WIDTH = 4, 72, 6, 120, 256
GRID, VIDEO = LatentGrid(12, 12), Chunk(0, 0, 8)
STEPS = tuple(980.0 - 50 * n for n in range(20))
WINDOW = (100, 800)
RANGES = {"self": 2, "temporal": 3, "cross": 6}  # Latte's published ones
PAB = ReusePolicy(tuple(Broadcast(kind, every, WINDOW) for kind, every in RANGES.items()))  # type: ignore[arg-type]
SPREAD, SCALE = 1.5, 3.0  # of the weights, of guidance
Predict = Callable[[Tensor, float, Tensor], Tensor]


def make_model() -> LatteTransformer3DModel:
    """The model whose weights all sides have."""
    torch.manual_seed(0)
    dim = HEADS * WIDTH
    model = LatteTransformer3DModel(
        num_attention_heads=HEADS,
        attention_head_dim=WIDTH,
        in_channels=4,
        out_channels=8,
        num_layers=LAYERS,
        cross_attention_dim=dim,
        attention_bias=True,
        sample_size=2 * GRID.rows,
        patch_size=2,
        activation_fn="gelu-approximate",
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        caption_channels=TEXT_WIDTH,
        video_length=VIDEO.frames,
    )
    for parameter in model.parameters():  # or neighbouring steps would hardly differ
        parameter.data.mul_(SPREAD)
    return model.eval().requires_grad_(False)


def drawn(seed: int, *shape: int) -> Tensor:
    """Random numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


START = drawn(1, 1, VIDEO.frames, 4, GRID.latent_height, GRID.latent_width)
PROMPT, NEGATIVE = drawn(2, 1, TEXT, TEXT_WIDTH), drawn(3, 1, TEXT, TEXT_WIDTH)


def sampled(
    predict: Predict, negative: Tensor | None = None, start: Tensor | None = None, steps: tuple[float, ...] = STEPS
) -> Tensor:
    """Euler steps with the first half of each prediction; guided in two calls a step with a negative prompt."""
    x = START if start is None else start
    for t in steps:
        noise = predict(x, t, PROMPT)[:, :, :4]
        if negative is not None:
            other = predict(x, t, negative)[:, :, :4]
            noise = other + SCALE * (noise - other)
        x = x - noise / len(STEPS)
    return x


def diffusers_predict(model: nn.Module, at: list[float]) -> Predict:
    """diffusers' forward, which tells its hooks the timestep by `at`."""

    def predict(x_BFCHW: Tensor, t: float, text: Tensor) -> Tensor:
        at[0] = t
        return model(x_BFCHW.transpose(1, 2), torch.tensor([t]), text, return_dict=False)[0].transpose(1, 2)

    return predict


def with_pyramid(model: LatteTransformer3DModel) -> Predict:
    """diffusers' PAB. Each kind names its own blocks, since its usual names take temporal attention for spatial."""
    at = [0.0]
    config = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=RANGES["self"],
        temporal_attention_block_skip_range=RANGES["temporal"],
        cross_attention_block_skip_range=RANGES["cross"],
        spatial_attention_timestep_skip_range=WINDOW,
        temporal_attention_timestep_skip_range=WINDOW,
        cross_attention_timestep_skip_range=WINDOW,
        spatial_attention_block_identifiers=("^transformer_blocks",),
        temporal_attention_block_identifiers=("^temporal_transformer_blocks",),
        cross_attention_block_identifiers=("^transformer_blocks",),
        current_timestep_callback=lambda: at[0],
    )
    apply_pyramid_attention_broadcast(model, config)
    return diffusers_predict(model, at)


class Layer(nn.Module):
    """A spatial and a temporal block as one, for cache-dit, which replaces one list of blocks."""

    def __init__(self, spatial: nn.Module, temporal: nn.Module, added: Tensor | None) -> None:
        super().__init__()
        self.spatial, self.temporal, self.added = spatial, temporal, added

    def forward(self, hidden_states: Tensor, mask: Any, text: Tensor, text_mask: Any, at: Tensor, *more: Any) -> Tensor:
        """Runs both, on one video."""
        x = self.spatial(hidden_states, mask, text, text_mask, at, *more).transpose(0, 1)
        x = x if self.added is None else x + self.added
        return self.temporal(x, None, None, None, at[:1].expand(len(x), -1), None, None).transpose(0, 1)


class Passed(nn.Module):
    """Stands where the temporal blocks were."""

    def forward(self, hidden_states: Tensor, *more: Any) -> Tensor:
        """Returns what it gets."""
        return hidden_states


def with_cache_dit(model: LatteTransformer3DModel) -> Predict:
    """cache-dit, with a threshold at which it skips about as much as PAB does, and a first block and a warm-up that
    suit so few layers and steps. With its own threshold of 0.08 it skips nothing here."""
    import cache_dit

    pairs = zip(model.transformer_blocks, model.temporal_transformer_blocks, strict=True)
    added = model.temp_pos_embed.clone()
    model.transformer_blocks = nn.ModuleList(Layer(*pair, None if n else added) for n, pair in enumerate(pairs))
    model.temporal_transformer_blocks = nn.ModuleList(Passed() for _ in range(LAYERS))
    model.temp_pos_embed = torch.zeros_like(added)
    adapter = cache_dit.BlockAdapter(
        transformer=model,
        blocks=model.transformer_blocks,
        forward_pattern=cache_dit.ForwardPattern.Pattern_3,
        check_forward_pattern=False,
        has_separate_cfg=False,
    )
    config = cache_dit.DBCacheConfig(
        Fn_compute_blocks=1, residual_diff_threshold=0.2, max_warmup_steps=4, num_inference_steps=len(STEPS)
    )
    cache_dit.enable_cache(adapter, cache_config=config)
    return diffusers_predict(model, [0.0])


def refreshed(model: nn.Module) -> None:
    """Makes cache-dit begin the next video without the residuals of the last one."""
    import cache_dit

    cache_dit.refresh_context(model, num_inference_steps=len(STEPS))
