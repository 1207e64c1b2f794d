"""The judge: one forward over all frames of a video with a block-causal mask, no cache, no ranks, no ring.

Who sees whom is worked out from lists of frames, on purpose in another way than `window.py` does it.

Shapes: B batch, F latent frames, C channels, H×W latent size; T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from causalrope_kernels import Projection, project
from causalrope_sp.grid import Chunk, LatentGrid, Shard
from causalrope_sp.models.causal_dit import CausalDiT, ForwardPass
from causalrope_sp.models.rope import RotaryTables


def visible_past(chunk: Chunk, window: int | None, sink: int) -> list[int]:
    """The frames before a chunk that it attends: the sink, then the newest, as many as the window has room for."""
    past = list(range(chunk.start))
    if window is None:
        return past
    room = window - chunk.frames
    pinned = past[:sink][:room]
    newest = past[sink:]
    return pinned + newest[len(newest) - min(len(newest), room - len(pinned)) :]


def block_causal_mask(chunks: Sequence[Chunk], tokens: int, window: int | None, sink: int) -> Tensor:
    """Who attends whom among [clean frames | noisy frames], a boolean (T, T): clean chunks attend clean ones, a noisy
    chunk attends the clean ones before it and itself."""
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
    """The velocity of every noisy chunk at `timestep` given the clean chunks before it, (B, F, C, H, W)."""
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
