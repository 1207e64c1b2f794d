"""The autoregressive sampling loop: denoise, output, commit. A generator of chunks of latents.

Shapes: B batch, F latent frames of a chunk, C channels, H×W latent size, s tokens of a frame on this rank,
E numbers in a token.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from causalrope_sp.attention.build import build_strategy, describe_strategy
from causalrope_sp.cache.window import SlidingWindow
from causalrope_sp.config import SamplerConfig, StreamConfig
from causalrope_sp.diffusion.noise import Noise
from causalrope_sp.diffusion.schedule import add_noise, branch_timesteps, model_timesteps, sigmas
from causalrope_sp.diffusion.solvers import start_solver
from causalrope_sp.distributed import SequenceParallel
from causalrope_sp.distributed.layout import Layout
from causalrope_sp.errors import ConfigError
from causalrope_sp.grid import Chunk, LatentGrid, split_into_chunks
from causalrope_sp.models.causal_dit import CausalDiT
from causalrope_sp.planning.machines import default_machine
from causalrope_sp.planning.strategy import choose_strategy
from causalrope_sp.planning.workload import Workload
from causalrope_sp.reuse.policy import ReusePlan, ReusePolicy
from causalrope_sp.sampling.chunk import LatentChunk, ShardContext, check_text
from causalrope_sp.sampling.guidance import UNCONDITIONAL, GuidanceBranches, check_guidance
from causalrope_sp.sampling.stream import CausalStream, Part

OnStep = Callable[[Chunk, int, float], object]


@dataclass(frozen=True)
class Source:
    """A video to redraw: denoising starts from its latents, noised to the level of `first_step`.

    Args:
        latents: returns the clean latents of a chunk, (B, F, C, H, W); it is called once a chunk, in order.
        first_step: the number of the first step to run, counted from 0.
    """

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
    layout: Layout | None = None,
    on_step: OnStep | None = None,
) -> Generator[LatentChunk]:
    """Generates a video chunk by chunk (Self-Forcing, arXiv 2506.08009), on one rank or many.

    Args:
        model: the DiT; its dtype is the dtype of the forward. The sampler's own state is float32 or wider.
        embeds: text embeddings, (B, text_len, text_dim), zeros after the text's end.
        noise: starting and fresh noise by (chunk, step); see `seeded_noise`.
        grid: the latent frame in tokens.
        frames: latent frames to generate; None generates without end and needs a window.
        stream: chunk length, window, sink and positions in time.
        sampler: steps, solver and guidance.
        parallel: the ranks; one process if None. With 2 ranks on the mesh's `cfg` axis the conditional and the
            unconditional forward run at once.
        initial_latents: latent frames to continue, (B, F0, C, H, W); they are not yielded again.
        source: a video to start each chunk from, instead of from noise alone.
        negative_embeds: embeddings of the negative prompt, like `embeds`; ignored if the guidance scale is 1.
        reuse: which attention outputs later steps of a chunk take over from earlier ones (Pyramid Attention Broadcast,
            arXiv 2408.12588). It changes the result, equally on any number of ranks. None computes all outputs.
        layout: how the ranks share attention; None takes what `choose_strategy` returns.
        on_step: called on every rank after each denoising step with the chunk, the step's number within it and the
            timestep that the model was called with. If it raises, it must raise on all ranks.

    Yields:
        LatentChunk: before the chunk's context pass; the last chunk has no context pass.

    Raises:
        ConfigError: `frames` is below 1, an endless video has no window, a shape does not fit the model or the grid,
            the strategy cannot use the ranks, `source` starts at a step that the sampler does not have, guidance lacks
            `negative_embeds` or applies to no step, or a mesh axis has no use.
    """
    loop = ChunkLoop(
        model,
        embeds,
        noise,
        grid,
        frames,
        stream=stream,
        sampler=sampler,
        parallel=parallel,
        initial_latents=initial_latents,
        source=source,
        negative_embeds=negative_embeds,
        reuse=reuse,
        layout=layout,
        on_step=on_step,
    )
    for chunk in loop.chunks():
        tokens = loop.denoise(chunk)
        yield loop.output(chunk, tokens)
        loop.finish(chunk, tokens)


class ChunkLoop:
    """The state of `sample_chunks`, whose arguments it takes, and the steps of its loop as methods."""

    def __init__(
        self,
        model: CausalDiT,
        embeds: Tensor,
        noise: Noise,
        grid: LatentGrid,
        frames: int | None,
        *,
        stream: StreamConfig,
        sampler: SamplerConfig,
        parallel: SequenceParallel | None = None,
        initial_latents: Tensor | None = None,
        source: Source | None = None,
        negative_embeds: Tensor | None = None,
        reuse: ReusePolicy | None = None,
        layout: Layout | None = None,
        on_step: OnStep | None = None,
    ) -> None:
        _check_length(frames, stream)
        check_text(model, embeds, grid)
        self._parallel = parallel or SequenceParallel.single()
        self._context = ShardContext.of(model, grid, self._parallel.shard(grid), len(embeds))
        self._context.check_initial(initial_latents)
        self._noise, self._source, self._stream, self._sampler = noise, source, stream, sampler
        self._initial = 0 if initial_latents is None else initial_latents.shape[1]
        self._frames, self._on_step = frames, on_step
        self._levels, self._timesteps = sigmas(sampler), model_timesteps(sampler)
        self._first_step = 0 if source is None else source.first_step
        if not 0 <= self._first_step < len(self._levels):
            raise ConfigError(
                f"a source starts at one of the steps 0 to {len(self._levels) - 1}, not at {self._first_step}"
            )
        check_guidance(sampler, self._parallel.mesh.cfg)
        if self._parallel.mesh.chunk > 1:
            raise ConfigError(f"chunk {self._parallel.mesh.chunk} of the mesh is for chunks made in parallel alone")
        self._open(model, embeds, negative_embeds, reuse, layout)
        self._next_index = 0
        if initial_latents is not None:
            self._commit_initial(initial_latents)

    def _open(
        self,
        model: CausalDiT,
        embeds: Tensor,
        negative_embeds: Tensor | None,
        reuse: ReusePolicy | None,
        layout: Layout | None,
    ) -> None:
        """Chooses the strategy, checks that all ranks chose the same, and opens the conditional and, with guidance, the
        unconditional stream."""
        parallel, grid, sampler, config = self._parallel, self._context.grid, self._sampler, model.config
        window = _window(self._stream, self._frames, self._initial)
        batch, itemsize = len(embeds), model.dtype.itemsize
        work = Workload.of(config, grid, self._stream, sampler, window.frames, batch, itemsize, reuse)
        layout = layout or choose_strategy(work, default_machine(parallel.device), parallel)
        described = describe_strategy(parallel, layout, config.num_heads)
        parallel.denoisers.agree({"strategy": described, "sampler": sampler, "reuse": reuse})
        strategy = build_strategy(parallel, layout, grid, config.num_heads)
        relative = self._stream.rope == "relative"

        def open_stream(prompt: Tensor, branch: int) -> CausalStream:
            passes = branch_timesteps(sampler, branch == UNCONDITIONAL, self._first_step)
            plan = None if reuse is None else ReusePlan.of_causal(reuse, passes, config.num_layers)
            shard = self._context.shard
            return CausalStream(model, prompt, grid, window, shard, strategy, relative=relative, reuse=plan)

        self._branches = GuidanceBranches(open_stream, embeds, negative_embeds, sampler, parallel)

    def chunks(self) -> Iterator[Chunk]:
        """Yields the chunks to generate, in order of time."""
        return self._cut(self._frames, self._next_index, self._initial)

    def denoise(self, chunk: Chunk) -> Tensor:
        """Denoises a chunk and returns its clean tokens on this rank, (B, F, s, E)."""
        levels = self._levels
        x = self._draw(chunk, self._first_step)
        if self._source is not None:
            clean = self._source.latents(chunk)
            clean = self._context.checked_tokens(f"the source of chunk {chunk.index}", chunk.frames, clean)
            x = add_noise(clean, x, levels[self._first_step])
        solve = start_solver(self._sampler, self._first_step)
        for step, sigma in enumerate(levels[self._first_step :], self._first_step):
            velocity = self._branches.velocity(chunk, x, step)
            to = levels[step + 1] if step + 1 < len(levels) else 0.0
            x = solve(x, velocity, sigma, to, partial(self._draw, chunk, step + 1))
            if self._on_step is not None:
                self._on_step(chunk, step, self._timesteps[step])
        return x

    def output(self, chunk: Chunk, tokens_BFSE: Tensor) -> LatentChunk:
        """Gathers the whole latents of a chunk on every rank."""
        self._parallel.comm_stats.keep(self._branches.stored_bytes)
        grid = self._context.grid
        return LatentChunk(chunk, grid.unpatchify(self._parallel.gather_tokens(tokens_BFSE, grid)))

    def finish(self, chunk: Chunk, tokens_BFSE: Tensor) -> None:
        """Keeps a chunk's clean tokens for its context pass, which runs with the next chunk's first denoise pass."""
        self._branches.finish(Part(chunk, tokens_BFSE, 0.0))

    def commit(self) -> None:
        """Runs the pending context pass now, in a forward of its own. The result is the same."""
        self._branches.commit()

    def _commit_initial(self, latents_BFCHW: Tensor) -> None:
        """Runs the context passes of the initial latents; that of the last chunk stays pending."""
        for chunk in self._cut(self._initial, 0, 0):
            self.commit()
            self.finish(chunk, self._context.tokens(latents_BFCHW[:, chunk.start : chunk.stop]))
            self._next_index = chunk.index + 1

    def _draw(self, chunk: Chunk, step: int) -> Tensor:
        noise = self._noise(chunk, step)
        return self._context.checked_tokens(f"the noise of chunk {chunk.index}", chunk.frames, noise)

    def _cut(self, frames: int | None, index: int, start: int) -> Iterator[Chunk]:
        lone = self._stream.independent_first_frame
        return split_into_chunks(
            frames, self._stream.chunk_frames, independent_first_frame=lone, index=index, start=start
        )


def _window(stream: StreamConfig, frames: int | None, initial: int) -> SlidingWindow:
    """Returns the stream's window, or one that holds the whole video if that is shorter, so that nothing is evicted."""
    total = None if frames is None else initial + frames
    if total is not None and (stream.window is None or stream.window >= total):
        return SlidingWindow(total)
    assert stream.window is not None, "`_check_length` has checked that an endless video has a window"
    return SlidingWindow(stream.window, stream.sink)


def _check_length(frames: int | None, stream: StreamConfig) -> None:
    if frames is None and stream.window is None:
        raise ConfigError("an endless video needs a window")
    if frames is not None and frames < 1:
        raise ConfigError(f"frames must be at least 1, not {frames}")
