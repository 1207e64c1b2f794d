"""The loop: denoise, hand out, commit. A generator of chunks of latents.

Shapes: B batch, F latent frames of a chunk, C channels, H×W latent size, s tokens of a frame on this rank,
E numbers in a token.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from causalrope_sp.cache.window import SlidingWindow
from causalrope_sp.config import SamplerConfig, StreamConfig
from causalrope_sp.devices import send
from causalrope_sp.diffusion.noise import Noise
from causalrope_sp.diffusion.schedule import add_noise, branch_timesteps, sigmas
from causalrope_sp.diffusion.solvers import start_solver
from causalrope_sp.distributed import SequenceParallel
from causalrope_sp.errors import ConfigError
from causalrope_sp.grid import Chunk, LatentGrid, split_into_chunks
from causalrope_sp.models.causal_dit import CausalDiT
from causalrope_sp.planning.workload import Workload
from causalrope_sp.reuse.policy import ReusePlan, ReusePolicy
from causalrope_sp.sampling.guidance import NEGATIVE, Branches, check_guidance
from causalrope_sp.sampling.stream import CausalStream, Part


@dataclass(frozen=True)
class LatentChunk:
    """A finished chunk: whole frames, (B, F, C, H, W), on every rank."""

    chunk: Chunk
    latents: Tensor


@dataclass(frozen=True)
class Source:
    """A video to redraw: a chunk's denoising starts from its clean latents, (B, F, C, H, W), noised to the level of
    `first_step`. They are asked for once a chunk, in order."""

    latents: Callable[[Chunk], Tensor]
    first_step: int


@torch.inference_mode()
def sample_chunks(
    model: CausalDiT,
    embeds: Tensor,
    noise: Noise,
    grid: LatentGrid,
    frames: int | None,
    *,
    stream: StreamConfig = StreamConfig(),
    sampler: SamplerConfig = SamplerConfig(),
    parallel: SequenceParallel | None = None,
    initial_latents: Tensor | None = None,
    source: Source | None = None,
    negative_embeds: Tensor | None = None,
    reuse: ReusePolicy | None = None,
    fuse_context_pass: bool = True,
) -> Generator[LatentChunk]:
    """Generates a video chunk by chunk (Self-Forcing, arXiv 2506.08009), on one rank or many.

    Args:
        model: the DiT; its dtype is the dtype of the forward. The sampler's own state is float32 or wider.
        embeds: text embeddings, (B, text_len, text_dim), zeros after the text's end.
        noise: starting and fresh noise by (chunk, step); see `seeded_noise`.
        grid: the latent frame in tokens.
        frames: latent frames to generate; None goes on for ever and needs a window.
        stream: chunk length, window, sink, places in time.
        sampler: steps, solver and guidance.
        parallel: the ranks; one process if None. On two lanes of them the two branches of guidance run at once.
        initial_latents: given frames to continue, (B, F0, C, H, W); they are not handed out again.
        source: a video to start each chunk from, instead of from noise alone.
        negative_embeds: what guidance leads away from, like `embeds`; not looked at where the scale is 1.
        reuse: which attention outputs later steps take over from earlier ones of their chunk (PAB); it changes the
            result, the same way on any number of ranks. None computes all of them.
        fuse_context_pass: let a chunk's context pass ride with the next chunk's first denoise pass. Exact either way.

    Yields:
        LatentChunk: handed out before the chunk's context pass; the last chunk has none.

    Raises:
        ConfigError: `frames` below 1, no window for an endless video, shapes that do not fit the model or the grid,
            ranks that the strategy cannot use, a `source` that starts at no step of the sampler's, guidance without
            `negative_embeds` or at no step, lanes without guidance.
    """
    parallel = parallel or SequenceParallel.single()
    check_inputs(model, embeds, grid, frames, stream, initial_latents)
    given = 0 if initial_latents is None else initial_latents.shape[1]
    window, shard = _window(stream, frames, given), parallel.shard(grid)
    work = Workload.of(model.config, grid, stream, sampler, window.frames, len(embeds), model.dtype.itemsize, reuse)
    check_guidance(sampler, parallel.mesh.lanes)
    parallel.denoisers.agree({"strategy": parallel.describe(work), "sampler": sampler, "reuse": reuse})
    strategy, levels = parallel.strategy(work), sigmas(sampler)
    begin = 0 if source is None else source.first_step
    if not 0 <= begin < len(levels):
        raise ConfigError(f"a source starts at one of the steps 0 to {len(levels) - 1}, not at {begin}")

    def open_stream(prompt: Tensor, branch: int) -> CausalStream:
        passes, relative = branch_timesteps(sampler, branch == NEGATIVE, begin), stream.rope == "relative"
        plan = None if reuse is None else ReusePlan.of_causal(reuse, passes, model.config.num_layers)
        return CausalStream(model, prompt, grid, window, shard, strategy, relative=relative, reuse=plan)

    branches = Branches(open_stream, embeds, negative_embeds, sampler, parallel)
    precise = torch.float64 if model.dtype == torch.float64 else torch.float32

    def mine(latents: Tensor) -> Tensor:
        return send(grid.patchify(latents)[:, :, shard.start : shard.stop].contiguous(), model.device, precise)

    def checked(name: str, chunk: Chunk, latents: Tensor) -> Tensor:
        expected = (len(embeds), chunk.frames, model.config.in_channels, grid.latent_height, grid.latent_width)
        if latents.shape != expected:
            raise ConfigError(
                f"the {name} of chunk {chunk.index} has shape {tuple(latents.shape)}, expected {expected}"
            )
        return mine(latents)

    def draw(chunk: Chunk, step: int) -> Tensor:
        return checked("noise", chunk, noise(chunk, step))

    first = 0
    if initial_latents is not None:
        for chunk in _chunks(given, stream):
            branches.commit()
            branches.finish(Part(chunk, mine(initial_latents[:, chunk.start : chunk.stop]), 0.0))
            first = chunk.index + 1

    for chunk in _chunks(frames, stream, index=first, start=given):
        if not fuse_context_pass:
            branches.commit()
        x = draw(chunk, begin)
        if source is not None:
            x = add_noise(checked("source", chunk, source.latents(chunk)), x, levels[begin])
        solve = start_solver(sampler, begin)
        for step, sigma in enumerate(levels[begin:], begin):
            velocity = branches.velocity(chunk, x, step)
            to = levels[step + 1] if step + 1 < len(levels) else 0.0
            x = solve(x, velocity, sigma, to, partial(draw, chunk, step + 1))
        parallel.ledger.keep(branches.stored_bytes)
        yield LatentChunk(chunk, grid.unpatchify(parallel.gather_tokens(x, grid)))
        branches.finish(Part(chunk, x, 0.0))


def _chunks(frames: int | None, stream: StreamConfig, index: int = 0, start: int = 0) -> Iterator[Chunk]:
    return split_into_chunks(
        frames, stream.chunk_frames, independent_first_frame=stream.independent_first_frame, index=index, start=start
    )


def _window(stream: StreamConfig, frames: int | None, given: int) -> SlidingWindow:
    """The stream's window, or one that holds the whole video where that is shorter and nothing is ever evicted."""
    total = None if frames is None else given + frames
    if total is not None and (stream.window is None or stream.window >= total):
        return SlidingWindow(total)
    assert stream.window is not None, "checked: an endless video has a window"
    return SlidingWindow(stream.window, stream.sink)


def check_inputs(
    model: CausalDiT,
    embeds: Tensor,
    grid: LatentGrid,
    frames: int | None,
    stream: StreamConfig,
    initial_latents: Tensor | None,
) -> None:
    """Raises ConfigError unless the model, its text, the grid, the length and what is given fit together."""
    config = model.config
    if frames is None and stream.window is None:
        raise ConfigError("an endless video needs a window")
    if frames is not None and frames < 1:
        raise ConfigError(f"frames must be at least 1, not {frames}")
    if embeds.ndim != 3 or embeds.shape[1:] != (config.text_len, config.text_dim):
        raise ConfigError(
            f"text embeddings have shape {tuple(embeds.shape)}, expected (batch, {config.text_len}, {config.text_dim})"
        )
    if grid.patch != config.patch_size[1:]:
        raise ConfigError(f"the grid's patch is {grid.patch}, the model's {config.patch_size[1:]}")
    frame = (config.in_channels, grid.latent_height, grid.latent_width)
    if initial_latents is not None and (
        initial_latents.ndim != 5 or len(initial_latents) != len(embeds) or initial_latents.shape[2:] != frame
    ):
        raise ConfigError(
            f"initial latents have shape {tuple(initial_latents.shape)}, expected ({len(embeds)}, frames, {frame[0]}, "
            f"{frame[1]}, {frame[2]})"
        )
