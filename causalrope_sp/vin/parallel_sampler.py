"""The sampling loop of parallel chunks (Video Interface Networks): read, denoise, guide, fuse. A generator of steps.

Shapes: B batch, F latent frames, C channels, H×W latent size, s tokens of a frame on this rank, E numbers in a token.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from causalrope_sp.config import SamplerConfig, StreamConfig
from causalrope_sp.diffusion.noise import Noise
from causalrope_sp.diffusion.schedule import guide, guided_steps, model_timesteps, predict_x0, sigmas
from causalrope_sp.diffusion.solvers import start_solver
from causalrope_sp.distributed import SequenceParallel
from causalrope_sp.distributed.layout import Layout
from causalrope_sp.errors import ConfigError
from causalrope_sp.grid import Chunk, LatentGrid
from causalrope_sp.models.causal_dit import CausalDiT
from causalrope_sp.planning.strategy import layout_of_stream
from causalrope_sp.planning.workload import Workload
from causalrope_sp.sampling.agreement import agree_on_strategy
from causalrope_sp.sampling.chunk import ShardContext, check_text
from causalrope_sp.vin.chunks import AssignedChunks, cut
from causalrope_sp.vin.fusion import join
from causalrope_sp.vin.network import VideoInterfaceNetwork, differing
from causalrope_sp.vin.parallel_forward import ParallelChunksForward
from causalrope_sp.vin.vin_config import ParallelChunksConfig, check_preview

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepOutput:
    """What a finished step of sampling reports.

    Args:
        step: the step's number, counted from 1.
        steps: how many steps there are.
        timestep: the timestep that the model was called with, in [0, 1000].
        latents: (B, F, C, H, W) on every rank: the video after the last step, the predicted clean video after a step
            with a preview, None otherwise.
    """

    step: int
    steps: int
    timestep: float
    latents: Tensor | None

    @property
    def last(self) -> bool:
        """Whether this is the last step, so that `latents` is the video."""
        return self.step == self.steps


@torch.inference_mode()
def sample_parallel_chunks(
    model: CausalDiT,
    vin: VideoInterfaceNetwork | None,
    embeds: Tensor,
    noise: Noise,
    grid: LatentGrid,
    frames: int,
    *,
    chunks: ParallelChunksConfig,
    sampler: SamplerConfig = SamplerConfig(),
    parallel: SequenceParallel | None = None,
    initial_latents: Tensor | None = None,
    preview_every: int | None = None,
    layout: Layout | None = None,
) -> Iterator[StepOutput]:
    """Generates a whole video at once (Video Interface Networks, arXiv 2503.17539), on one rank or many.

    The chunks are divided among the ranks of the mesh's `chunk` axis, the tokens of their frames among the ranks of its
    `sp` axis. The video does not depend on the size of either.

    Args:
        model: the DiT; its dtype is the dtype of the forward. The sampler's own state is float32 or wider.
        vin: its Video Interface Network; without one (None) chunks influence one another through their overlaps alone,
            and guidance by global tokens has no effect.
        embeds: text embeddings, (B, text_len, text_dim), zeros after the text's end.
        noise: starting and fresh noise, see `seeded_noise`; it is called frame by frame, as if each were a chunk.
        grid: the latent frame in tokens.
        frames: latent frames to generate.
        chunks: how the video is cut into chunks, and how these are fused and guided.
        sampler: steps and solver.
        parallel: the ranks; one process if None.
        initial_latents: latent frames before the video, (B, F0, C, H, W), which every chunk attends; they are not
            yielded again.
        preview_every: yield the predicted clean video after every so many steps; None yields the last one alone.
        layout: how the ranks of the `sp` axis share attention; None takes what `choose_strategy` returns.

    Yields:
        StepOutput: after every step.

    Raises:
        ConfigError: `frames` or `preview_every` is below 1, a shape does not fit the model or the grid, the VIN belongs
            to another DiT, the sampler guides a step by the text, the mesh has ranks for guidance or decoding, or the
            strategy cannot use the ranks.
    """
    parallel = parallel or SequenceParallel.single()
    _check(model, vin, embeds, grid, frames, chunks, sampler, parallel, preview_every)
    context = ShardContext.of(model, grid, parallel.shard(grid), len(embeds))
    context.check_initial(initial_latents)
    initial_frames = 0 if initial_latents is None else initial_latents.shape[1]
    cuts = cut(frames, chunks, initial_frames)
    assigned = AssignedChunks(cuts, chunks, parallel.chunk_rank, parallel.mesh.chunk)
    stream, longest = StreamConfig(chunk_frames=chunks.chunk_frames), chunks.chunk_frames + initial_frames
    work = Workload.of(model.config, grid, stream, sampler, longest, len(embeds), model.dtype.itemsize)
    agreed = {"sampler": sampler, "chunks": (frames, initial_frames, chunks, preview_every), "vin": vin and vin.config}
    strategy = agree_on_strategy(parallel, work, layout_of_stream(work, parallel, layout), agreed)
    state = ParallelChunksForward(model, vin, embeds, grid, assigned, initial_frames, strategy, parallel)
    if initial_latents is not None:
        state.commit(context.tokens(initial_latents))
    yield from _steps(state, context, noise, chunks, sampler, preview_every)


def _steps(
    state: ParallelChunksForward,
    context: ShardContext,
    noise: Noise,
    chunks: ParallelChunksConfig,
    sampler: SamplerConfig,
    preview_every: int | None,
) -> Iterator[StepOutput]:
    """Denoises the chunks of this rank step by step."""
    solve, levels, timesteps = start_solver(sampler), sigmas(sampler), model_timesteps(sampler)
    held = state.assigned.held

    def draw(step: int) -> Tensor:
        """Draws the noise of the frames that this rank holds, frame by frame."""
        drawn = [
            context.checked_tokens("the noise of a frame", 1, noise(Chunk(frame, frame, 1), step)) for frame in held
        ]
        return torch.cat(drawn, 1) if drawn else context.tokens(torch.empty(context.shape(0)))

    x = draw(0)
    for step, sigma in enumerate(levels):
        fused = chunks.fuses(step, len(levels))
        velocities = _guided_velocities(state, x, timesteps[step], chunks)
        before, after = state.across.swap(velocities, x, fused)
        velocity = join(velocities, chunks.overlap, fused=fused, before=before, after=after) if velocities else x
        to = levels[step + 1] if step + 1 < len(levels) else 0.0
        preview = preview_every is not None and (step + 1) % preview_every == 0
        predicted = predict_x0(x, velocity, sigma) if preview else x
        x = solve(x, velocity, sigma, to, partial(draw, step + 1))
        shown = x if step + 1 == len(levels) else predicted if preview else None
        latents = None if shown is None else context.grid.unpatchify(state.across.gather(shown))
        yield StepOutput(step + 1, len(levels), timesteps[step], latents)


def _guided_velocities(
    state: ParallelChunksForward, x: Tensor, timestep: float, chunks: ParallelChunksConfig
) -> list[Tensor]:
    """The velocities of a step, chunk by chunk: of one forward, or of two that guide by the global tokens."""
    conditional = state.velocities(x, timestep)
    if not (state.has_global_tokens and chunks.guides(timestep)):
        return conditional
    unconditional = state.velocities(x, timestep, attend_globals=False)
    scale = chunks.global_guidance_scale
    return [guide(*velocities, scale) for velocities in zip(conditional, unconditional, strict=True)]


def _check(
    model: CausalDiT,
    vin: VideoInterfaceNetwork | None,
    embeds: Tensor,
    grid: LatentGrid,
    frames: int,
    chunks: ParallelChunksConfig,
    sampler: SamplerConfig,
    parallel: SequenceParallel,
    preview_every: int | None,
) -> None:
    """Raises ConfigError for arguments that do not fit one another."""
    if frames < 1:
        raise ConfigError(f"frames must be at least 1, not {frames}")
    check_text(model, embeds, grid)
    check_preview(preview_every)
    if vin is not None and (wrong := differing(vin.dit, model.config)):
        raise ConfigError(f"vin is for another DiT than this one: {'; '.join(wrong)}")
    if any(guided_steps(sampler)) or parallel.mesh.cfg > 1:
        raise ConfigError(
            "parallel chunks have no guidance by a negative text: guidance_scale must be 1, not "
            f"{sampler.guidance_scale:g}, and cfg of the mesh 1, not {parallel.mesh.cfg}"
        )
    guided = chunks.global_guidance_scale != 1 and vin is not None
    if guided and not any(map(chunks.guides, model_timesteps(sampler))):
        (low, high), timesteps = chunks.global_guidance_interval, model_timesteps(sampler)
        _log.warning(
            "no step is guided by global tokens: the global_guidance_interval is %g to %g, and the %d steps are at "
            "timesteps %g to %g", low, high, len(timesteps), timesteps[-1], timesteps[0],
        )  # fmt: skip
    if parallel.mesh.decode:
        raise ConfigError(
            f"parallel chunks are all finished by the last step, so decode ranks would have nothing to do: expected "
            f"none, got {parallel.mesh.decode}"
        )
