"""Open-Sora's sampling: guided Euler steps of a rectified flow, with some of the first frames given.

Shapes: B batch, F latent frames, C latent channels, H×W latent size, L text tokens, E their width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from causalrope_sp.distributed import SequenceParallel
from causalrope_sp.grid import Chunk, LatentGrid, shares
from causalrope_sp.reuse.policy import ReusePolicy
from causalrope_sp.spatiotemporal.guidance import Guidance
from causalrope_sp.spatiotemporal.open_sora.open_sora_dit import OpenSoraDiT
from causalrope_sp.spatiotemporal.open_sora.open_sora_stream import OpenSoraStream
from causalrope_sp.spatiotemporal.open_sora.open_sora_vae import CLIP_FRAMES, CLIP_LATENT_FRAMES

TRAIN_STEPS = 1000
LEARNED_PIXELS = 512 * 512  # of a frame for which the timesteps are not shifted


def timesteps(steps: int, height: int, width: int, frames: int) -> tuple[float, ...]:
    """Returns the timesteps of the passes, from 1000 down: evenly spaced, then shifted by the size of the video.

    Args:
        steps: how many passes there are.
        height: of a frame, in pixels.
        width: of a frame, in pixels.
        frames: pixel frames of the video.
    """
    latent_frames = 1 if frames == 1 else frames // CLIP_FRAMES * CLIP_LATENT_FRAMES
    shift = math.sqrt(height * width / LEARNED_PIXELS) * math.sqrt(latent_frames)
    even = [1 - step / steps for step in range(steps)]
    return tuple(TRAIN_STEPS * shift * t / (1 + (shift - 1) * t) for t in even)


def sample(
    model: OpenSoraDiT,
    noise_BFCHW: Tensor,
    texts_LE: Sequence[Tensor],
    null_texts_LE: Sequence[Tensor],
    *,
    timesteps: tuple[float, ...],
    guidance_scale: float,
    fps: float,
    given: int = 0,
    parallel: SequenceParallel | None = None,
    reuse: ReusePolicy | None = None,
) -> Tensor:
    """Samples a video's latents. Every rank must call.

    Args:
        model: the model.
        noise_BFCHW: the starting noise, and the latents of the given frames in their place.
        texts_LE: the text of every batch entry; see `packed`.
        null_texts_LE: the text of the unconditional branch for every batch entry.
        timesteps: the timesteps of the passes.
        guidance_scale: 1 has no unconditional branch.
        fps: the frame rate, in frames a second.
        given: how many of the first frames are given; they stay as they are.
        parallel: the ranks; None is one process. On a `cfg` axis of two ranks both branches run at once.
        reuse: the outputs that a pass takes from an earlier pass; None computes every output.

    Returns:
        The latents, (B, F, C, H, W), on every rank.

    Raises:
        ConfigError: a size does not fit; see `OpenSoraStream` and `Guidance`.
    """
    parallel = parallel or SequenceParallel.single(device=model.device)
    guidance, patch = Guidance(guidance_scale, parallel), model.config.patch_size
    _, frames, _, height, width = noise_BFCHW.shape
    grid, video = LatentGrid.from_latent(height, width, (patch, patch)), Chunk(0, 0, frames)
    stream = OpenSoraStream(
        model,
        guidance.own(texts_LE, null_texts_LE),
        grid,
        fps=fps,
        given=given,
        parallel=parallel,
        timesteps=timesteps,
        reuse=reuse,
    )
    tokens = stream.mine(grid.patchify(noise_BFCHW)).clone()
    first = sum(shares(video.frames, parallel.mesh.sp)[: parallel.sp_rank])
    moving = tokens[:, max(0, given - first) :]  # a view of the frames that are not given
    for t, after in zip(timesteps, (*timesteps[1:], 0.0), strict=True):
        predicted = stream.denoise(video, guidance.inputs(tokens), t)
        velocity = guidance.combine(predicted.unflatten(-1, (-1, model.config.predicted_channels)))
        velocity = velocity[..., : model.config.in_channels].flatten(-2)
        moving += velocity[:, tokens.shape[1] - moving.shape[1] :] * ((t - after) / TRAIN_STEPS)
    if stream.outputs is not None:
        parallel.comm_stats.keep(stream.outputs.most_bytes)
    return grid.unpatchify(stream.gather(tokens, video))
