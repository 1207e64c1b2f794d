"""The reference for streaming: one forward over all frames of a video with a block-causal mask, without cache or ranks.

The mask is computed from lists of frames, deliberately by another method than that of `cache/window.py`.

Shapes: B batch, F latent frames, C channels, H×W latent size; T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from causalrope_kernels import Projection, project
from causalrope_sp.grid import Chunk, LatentGrid, Shard
from causalrope_sp.models.block import ForwardPass
from causalrope_sp.models.causal_dit import CausalDiT
from causalrope_sp.models.rope import RotaryTables


def visible_past(chunk: Chunk, window: int | None, sink: int) -> list[int]:
    """Returns the frames before a chunk that it attends: the sink, then the newest ones that fit the window.

    Args:
        chunk: the chunk that attends.
        window: latent frames that attention looks back over, the chunk's own included; None for all.
        sink: latent frames of the stream's start that never leave the window.
    """
    past = list(range(chunk.start))
    if window is None:
        return past
    past_frames = window - chunk.frames
    pinned = past[:sink][:past_frames]
    newest = past[sink:]
    return pinned + newest[len(newest) - min(len(newest), past_frames - len(pinned)) :]


def block_causal_mask(chunks: Sequence[Chunk], tokens: int, window: int | None, sink: int) -> Tensor:
    """Builds the attention mask of [clean frames | noisy frames]: clean chunks attend clean ones up to themselves, a
    noisy chunk attends the clean ones before it and itself.

    Args:
        chunks: all chunks of the video.
        tokens: tokens of a frame.
        window: see `visible_past`.
        sink: see `visible_past`.

    Returns:
        A boolean mask (T, T), True where a query attends a key.
    """
    frames = sum(chunk.frames for chunk in chunks)
    allowed = torch.zeros(2 * frames, 2 * frames, dtype=torch.bool)
    for chunk in chunks:
        own = list(range(chunk.start, chunk.stop))
        for query in own:
            allowed[query, visible_past(chunk, window, sink) + own] = True
            allowed[frames + query, visible_past(chunk, window, sink) + [frames + frame for frame in own]] = True
    return allowed.repeat_interleave(tokens, 0).repeat_interleave(tokens, 1)


@torch.inference_mode()
def block_causal_velocity(
    model: CausalDiT,
    embeds: Tensor,
    grid: LatentGrid,
    chunks: Sequence[Chunk],
    clean_BFCHW: Tensor,
    noisy_BFCHW: Tensor,
    timestep: float,
    *,
    window: int | None = None,
    sink: int = 0,
) -> Tensor:
    """Computes the velocity of every noisy chunk from the clean chunks before it, in one forward.

    Args:
        model: the DiT.
        embeds: text embeddings, (B, text_len, text_dim).
        grid: the latent frame in tokens.
        chunks: all chunks of the video.
        clean_BFCHW: its clean latents.
        noisy_BFCHW: its noisy latents.
        timestep: the noise level of the noisy latents, in [0, 1000].
        window: see `visible_past`.
        sink: see `visible_past`.

    Returns:
        The velocity, (B, F, C, H, W).
    """
    frames = clean_BFCHW.shape[1]
    mask = block_causal_mask(chunks, grid.tokens, window, sink).to(model.device)

    def attend(_: int, projection: Projection) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in project(projection))
        return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)

    compute = torch.float64 if model.dtype == torch.float64 else torch.float32
    tables = RotaryTables(model.config.head_dim, model.config.theta, Shard(grid), model.device, compute)
    step = ForwardPass(
        timesteps_F=torch.tensor([0.0] * frames + [timestep] * frames, dtype=torch.float32, device=model.device),
        predicted_frames=frames,
        rotation=tables.rotation(2 * list(range(frames))),
        text=model.encode_text(embeds),
        attend=attend,
    )
    tokens = grid.patchify(torch.cat([clean_BFCHW, noisy_BFCHW], 1)).flatten(1, 2)
    velocity = model(tokens.to(model.device, model.dtype), step)
    return grid.unpatchify(velocity.unflatten(1, (frames, -1)))
