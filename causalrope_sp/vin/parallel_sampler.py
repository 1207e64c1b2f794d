"""The loop of chunks that are denoised together: read, denoise, fuse. A generator of steps.

Shapes: B batch, F latent frames, C channels, H×W latent size, s tokens of a frame on this rank, E numbers in a token.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from causalrope_sp.config import SamplerConfig, StreamConfig
from causalrope_sp.devices import send
from causalrope_sp.diffusion.noise import Noise
from causalrope_sp.diffusion.schedule import guided_steps, predict_x0, sigmas, told_timesteps
from causalrope_sp.diffusion.solvers import start_solver
from causalrope_sp.distributed import SequenceParallel
from causalrope_sp.errors import ConfigError
from causalrope_sp.grid import Chunk, LatentGrid
from causalrope_sp.models.causal_dit import CausalDiT
from causalrope_sp.planning.workload import Workload
from causalrope_sp.sampling.sampler import check_inputs
from causalrope_sp.vin.chunks import LaneChunks, cut
from causalrope_sp.vin.fusion import join
from causalrope_sp.vin.network import VideoInterfaceNetwork, differing
from causalrope_sp.vin.parallel_forward import TogetherForward
from causalrope_sp.vin.vin_config import TogetherConfig, check_preview


@dataclass(frozen=True)
class Moment:
    """Step `step` of `steps` is done. `latents`, (B, F, C, H, W) on every rank, are the video after the last step, what
    it looks to become where a preview was asked for, and None otherwise."""

    step: int
    steps: int
    latents: Tensor | None

    @property
    def last(self) -> bool:
        return self.step == self.steps


@torch.inference_mode()
def sample_together(
    model: CausalDiT,
    vin: VideoInterfaceNetwork | None,
    embeds: Tensor,
    noise: Noise,
    grid: LatentGrid,
    frames: int,
    *,
    chunks: TogetherConfig,
    sampler: SamplerConfig = SamplerConfig(),
    parallel: SequenceParallel | None = None,
    initial_latents: Tensor | None = None,
    preview_every: int | None = None,
) -> Iterator[Moment]:
    """Generates a whole video at once (Video Interface Networks, arXiv 2503.17539), on one rank or many.

    Lanes of ranks (`parallel.mesh`) share out the chunks, the ranks of a lane the tokens of its chunks. The same video
    at any number of either.

    Args:
        model: the DiT; its dtype is the dtype of the forward. The sampler's own state is float32 or wider.
        vin: its Video Interface Network; None denoises chunks that know of one another by their overlaps alone.
        embeds: text embeddings, (B, text_len, text_dim), zeros after the text's end.
        noise: starting and fresh noise; asked for frame by frame, as if each were a chunk, see `seeded_noise`.
        grid: the latent frame in tokens.
        frames: latent frames to generate.
        chunks: how they are cut, read and fused.
        sampler: steps and solver.
        parallel: the ranks; one process if None.
        initial_latents: given frames (B, F0, C, H, W) that every chunk sees; they are not handed out again.
        preview_every: hand out, every so many steps, the clean video that the step points to.

    Yields:
        Moment: after every step.

    Raises:
        ConfigError: `frames` or `preview_every` that is no whole number of at least 1, shapes that do not fit the model
            or the grid, a VIN of another DiT, guidance, ranks that only decode, or ranks that the strategy cannot use.
    """
    parallel = parallel or SequenceParallel.single()
    stream = StreamConfig(chunk_frames=chunks.chunk_frames)
    check_inputs(model, embeds, grid, frames, stream, initial_latents)
    check_preview(preview_every)
    if vin is not None and (wrong := differing(vin.dit, model.config)):
        raise ConfigError(f"the Video Interface Network is for another DiT than this one: {'; '.join(wrong)}")
    if any(guided_steps(sampler)):
        raise ConfigError("chunks made together are not guided: the guidance scale must be 1")
    if parallel.mesh.decoders:
        raise ConfigError("chunks made together end together: there is nothing for decode ranks to do meanwhile")
    given = 0 if initial_latents is None else initial_latents.shape[1]
    lane = LaneChunks(cut(frames, chunks, given), chunks, parallel.lane, parallel.mesh.lanes)
    work = Workload.of(
        model.config, grid, stream, sampler, chunks.chunk_frames + given, len(embeds), model.dtype.itemsize
    )
    parallel.denoisers.agree(
        {
            "strategy": parallel.describe(work),
            "sampler": sampler,
            "chunks": (frames, given, chunks, preview_every),
            "global tokens": vin and vin.config,
        }
    )
    strategy, shard = parallel.strategy(work), parallel.shard(grid)
    state = TogetherForward(model, vin, embeds, grid, lane, given, strategy, parallel)
    solve, levels, timesteps = start_solver(sampler), sigmas(sampler), told_timesteps(sampler)
    precise = torch.float64 if model.dtype == torch.float64 else torch.float32
    frame_shape = (len(embeds), 1, model.config.in_channels, grid.latent_height, grid.latent_width)

    def mine(latents: Tensor) -> Tensor:
        return send(grid.patchify(latents)[:, :, shard.start : shard.stop].contiguous(), model.device, precise)

    def draw(step: int) -> Tensor:
        drawn = [noise(Chunk(frame, frame, 1), step) for frame in lane.held]
        wrong = next((tuple(x.shape) for x in drawn if x.shape != frame_shape), None)
        if wrong is not None:
            raise ConfigError(f"the noise of a frame has shape {wrong}, expected {frame_shape}")
        return mine(torch.cat(drawn, 1) if drawn else torch.empty(frame_shape)[:, :0])

    if initial_latents is not None:
        state.commit(mine(initial_latents))
    x = draw(0)
    for step, sigma in enumerate(levels):
        fused = chunks.fuses(step, len(levels))
        velocities = state.velocities(x, timesteps[step])
        before, after = state.across.swap(velocities, x, fused)
        velocity = join(velocities, chunks.overlap, fused=fused, before=before, after=after) if velocities else x
        to = levels[step + 1] if step + 1 < len(levels) else 0.0
        preview = preview_every is not None and (step + 1) % preview_every == 0
        points_to = predict_x0(x, velocity, sigma) if preview else x
        x = solve(x, velocity, sigma, to, partial(draw, step + 1))
        done = x if step + 1 == len(levels) else points_to if preview else None
        yield Moment(step + 1, len(levels), None if done is None else grid.unpatchify(state.across.gather(done)))
