"""The autoregressive sampling loop: denoise, output, commit. A generator of chunks of latents.

Shapes: B batch, F latent frames of a chunk, C channels, H×W latent size, s tokens of a frame on this rank,
E numbers in a token.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import closing
from functools import partial
from typing import Any

import torch
from torch import Tensor

from causalrope_sp.cache.window import SlidingWindow
from causalrope_sp.config import StreamConfig
from causalrope_sp.diffusion.noise import Noise
from causalrope_sp.diffusion.schedule import add_noise, branch_timesteps, model_timesteps, sigmas
from causalrope_sp.diffusion.solvers import start_solver
from causalrope_sp.distributed import SequenceParallel
from causalrope_sp.errors import ConfigError
from causalrope_sp.grid import Chunk, LatentGrid, split_into_chunks
from causalrope_sp.models.causal_dit import CausalDiT
from causalrope_sp.planning.workload import Workload
from causalrope_sp.reuse.policy import ReusePlan
from causalrope_sp.sampling.agreement import agree_on_strategy, digest
from causalrope_sp.sampling.chunk import LatentChunk, ShardContext, check_text
from causalrope_sp.sampling.guidance import UNCONDITIONAL, GuidanceBranches, check_guidance
from causalrope_sp.sampling.pass_graphs import stream_graphs
from causalrope_sp.sampling.stream import CausalStream, Part
from causalrope_sp.sampling.stream_options import StreamOptions


def sample_chunks(
    model: CausalDiT,
    embeds: Tensor,
    noise: Noise,
    grid: LatentGrid,
    frames: int | None,
    *,
    parallel: SequenceParallel | None = None,
    **options: Any,
) -> Generator[LatentChunk]:
    """Generates a video chunk by chunk (Self-Forcing, arXiv 2506.08009), on one rank or many.

    Every rank must take the chunks of all its streams in the same order.

    Args:
        model: the DiT; its dtype is the dtype of the forward. The sampler's own state is float32 or wider.
        embeds: text embeddings, (B, text_len, text_dim), zeros after the text's end.
        noise: starting and fresh noise by (chunk, step); see `seeded_noise`.
        grid: the latent frame in tokens.
        frames: latent frames to generate; None generates without end and needs a window.
        parallel: the ranks; one process if None. With 2 ranks on the mesh's `cfg` axis the conditional and the
            unconditional forward run at once.
        options: fields of `StreamOptions`, such as `stream`, `sampler` and `initial_latents`.

    Yields:
        LatentChunk: before the chunk's context pass; the last chunk has no context pass.

    Raises:
        ConfigError: `frames` is below 1, an endless video has no window, a shape does not fit the model or the grid,
            the strategy cannot use the ranks, `source` starts at a step that the sampler does not have, guidance lacks
            `negative_embeds` or applies to no step, a mesh axis has no use, or ranks make different calls.
        RankLostError: another rank has ended, failed, or left the stream.
    """
    parallel = parallel or SequenceParallel.single()
    if parallel.mesh.decode:
        raise ConfigError("decode_ranks of the mesh must be 0 for latents alone: decode ranks serve a pipeline")
    turns = parallel.open_stream()
    chunks, made = sample_within_turns(model, embeds, noise, grid, frames, parallel=parallel, **options), 0
    with turns.taken(), closing(chunks):
        while frames is None or made < max(1, frames):  # wrong `frames` are for the loop to refuse
            with turns.chunk():
                output = next(chunks)
            made += output.chunk.frames
            yield output


@torch.inference_mode()
def sample_within_turns(
    model: CausalDiT,
    embeds: Tensor,
    noise: Noise,
    grid: LatentGrid,
    frames: int | None,
    *,
    parallel: SequenceParallel,
    **options: Any,
) -> Generator[LatentChunk]:
    """Generates the chunks of `sample_chunks`, whose arguments it takes, for a caller that takes each within a turn."""
    loop = ChunkLoop(model, embeds, noise, grid, frames, parallel, StreamOptions(**options))
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
        parallel: SequenceParallel,
        options: StreamOptions,
    ) -> None:
        _check_length(frames, options.stream)
        check_text(model, embeds, grid)
        self._model, self._opened_with = model, (model.device, model.dtype)
        self._parallel, self._options, self._noise, self._frames = parallel, options, noise, frames
        self._context = ShardContext.of(model, grid, parallel.shard(grid), len(embeds))
        self._context.check_initial(options.initial_latents)
        self._initial = 0 if options.initial_latents is None else options.initial_latents.shape[1]
        self._levels, self._timesteps = sigmas(options.sampler), model_timesteps(options.sampler)
        self._first_step = 0 if options.source is None else options.source.first_step
        if not 0 <= self._first_step < len(self._levels):
            raise ConfigError(
                f"a source starts at one of the steps 0 to {len(self._levels) - 1}, not at {self._first_step}"
            )
        check_guidance(options.sampler, parallel.mesh.cfg)
        if parallel.mesh.chunk > 1:
            raise ConfigError(f"chunk {parallel.mesh.chunk} of the mesh is for chunks made in parallel alone")
        self._branches = self._open(model, embeds)
        self._next_index, self._drawn = 0, False
        if options.initial_latents is not None:
            self._commit_initial(options.initial_latents)

    def _open(self, model: CausalDiT, embeds: Tensor) -> GuidanceBranches:
        """Chooses the strategy, checks that all ranks chose the same, and opens the conditional and, with guidance, the
        unconditional stream."""
        options, grid, config = self._options, self._context.grid, model.config
        stream, sampler, reuse = options.stream, options.sampler, options.reuse
        window = _window(stream, self._frames, self._initial)
        batch, itemsize = len(embeds), model.dtype.itemsize
        work = Workload.of(config, grid, stream, sampler, window.frames, batch, itemsize, reuse)
        agreed: dict[str, object] = {"sampler": sampler, "reuse": reuse, "frames": self._frames, "stream": stream}
        if self._parallel.denoisers.size > 1:  # two streams that are taken in another order on one rank differ in these
            tensors = {"text": embeds, "negative text": options.negative_embeds, "latents": options.initial_latents}
            agreed |= {name: digest(x) for name, x in tensors.items() if x is not None}
        strategy = agree_on_strategy(self._parallel, work, options.layout, agreed)
        relative = stream.rope == "relative"

        def open_stream(prompt: Tensor, branch: int) -> CausalStream:
            passes = branch_timesteps(sampler, branch == UNCONDITIONAL, self._first_step)
            plan = None if reuse is None else ReusePlan.of_causal(reuse, passes, config.num_layers)
            shard = self._context.shard
            graphs = stream_graphs(model.device) if options.graphs else None
            return CausalStream(
                model, prompt, grid, window, shard, strategy, relative=relative, reuse=plan, graphs=graphs
            )

        return GuidanceBranches(open_stream, embeds, options.negative_embeds, sampler, self._parallel)

    def chunks(self) -> Iterator[Chunk]:
        """Yields the chunks to generate, in order of time."""
        return self._cut(self._frames, self._next_index, self._initial)

    def denoise(self, chunk: Chunk) -> Tensor:
        """Denoises a chunk and returns its clean tokens on this rank, (B, F, s, E)."""
        levels = self._levels
        self._check_model()
        x = self._draw(chunk, self._first_step)
        if self._options.source is not None:
            clean = self._options.source.latents(chunk)
            self._agree(f"source of chunk {chunk.index}", clean)
            clean = self._context.checked_tokens(f"the source of chunk {chunk.index}", chunk.frames, clean)
            x = add_noise(clean, x, levels[self._first_step])
        solve = start_solver(self._options.sampler, self._first_step)
        for step, sigma in enumerate(levels[self._first_step :], self._first_step):
            velocity = self._branches.velocity(chunk, x, step)
            to = levels[step + 1] if step + 1 < len(levels) else 0.0
            x = solve(x, velocity, sigma, to, partial(self._draw, chunk, step + 1))
            if self._options.on_step is not None:
                self._options.on_step(chunk, step, self._timesteps[step])
        return x

    def _check_model(self) -> None:
        """Raises ConfigError if the model was moved or cast under the stream."""
        now = self._model.device, self._model.dtype
        if now != self._opened_with:
            ways = " and ".join(f"{dtype} on {device}" for device, dtype in (self._opened_with, now))
            raise ConfigError(f"the model of an open stream was moved or cast: {ways}; do so between two streams")

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
        if not self._drawn:
            self._agree("noise", noise)
            self._drawn = True
        return self._context.checked_tokens(f"the noise of chunk {chunk.index}", chunk.frames, noise)

    def _agree(self, name: str, x: Tensor) -> None:
        """Checks that a tensor is the same on all ranks that denoise."""
        if self._parallel.denoisers.size > 1:
            self._parallel.denoisers.agree({name: digest(x)})

    def _cut(self, frames: int | None, index: int, start: int) -> Iterator[Chunk]:
        lone = self._options.stream.independent_first_frame
        return split_into_chunks(
            frames, self._options.stream.chunk_frames, independent_first_frame=lone, index=index, start=start
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
