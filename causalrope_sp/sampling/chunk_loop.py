"""The state of one stream of latents between its chunks, and what can be done to it there: make the next chunk, change
the text, take chunks back, and fork.

Shapes: B batch, F latent frames of a chunk, C channels, H×W latent size, s tokens of a frame on this rank,
E numbers in a token.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from functools import partial

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
from causalrope_sp.sampling.guidance import CONDITIONAL, UNCONDITIONAL, GuidanceBranch, GuidanceBranches, check_guidance
from causalrope_sp.sampling.kept_latents import KeptLatents, oldest_of
from causalrope_sp.sampling.pass_graphs import stream_graphs
from causalrope_sp.sampling.stream import CausalStream, Part
from causalrope_sp.sampling.stream_options import StreamOptions


class ChunkLoop:
    """One stream of latents. It takes the arguments of `sample_chunks`.

    Attributes:
        next_chunk: the chunk that `step` makes next; None after the last one.
        kept: the clean latents from which the cache can be computed anew.
    """

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
        self._drawn = False
        self._texts: list[tuple[Tensor, bool, bool]] = []  # of the chunks after the next one
        window, more = options.stream.window, max(options.history, options.kept_chunks) * options.stream.chunk_frames
        self.kept = KeptLatents(None if window is None else window + more)
        self.next_chunk = self._chunk_at(0, 0)
        if options.initial_latents is not None:
            self._commit_initial(options.initial_latents)
        self._first_chunk = 0 if self.next_chunk is None else self.next_chunk.index

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
                model,
                prompt,
                grid,
                window,
                shard,
                strategy,
                relative=relative,
                reuse=plan,
                graphs=graphs,
                history=options.history,
            )

        return GuidanceBranches(open_stream, embeds, options.negative_embeds, sampler, self._parallel)

    @property
    def chunks_made(self) -> int:
        """How many chunks were made and not taken back."""
        return self._position[0] - self._first_chunk

    @property
    def _position(self) -> tuple[int, int]:
        """The number of the next chunk and the global time index of its first frame."""
        last = self.kept.last
        return (0, 0) if last is None else (last.chunk.index + 1, last.chunk.stop)

    def step(self) -> LatentChunk:
        """Makes the next chunk. If this is cut short, by an error or by the user, the stream is where it was.

        Returns:
            The chunk, on every rank.

        Raises:
            StopIteration: the video is complete.
            ConfigError: noise or source do not fit, or the model was moved or cast.
        """
        chunk = self.next_chunk
        if chunk is None:
            raise StopIteration
        try:
            tokens = self.denoise(chunk)
            output = self.output(chunk, tokens)
        except BaseException:
            self.cancel()
            raise
        self.finish(chunk, tokens)
        if self._texts:
            self._change_text(*self._texts.pop(0))
        return output

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
                on_step = partial(self._options.on_step, chunk, step, self._timesteps[step])
                self._parallel.denoisers.run_collectively(on_step)
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
        part = Part(chunk, tokens_BFSE, 0.0)
        self._branches.finish(part)
        self.kept.add(part, self._branches.branches[0].stream.cache.window)
        self.next_chunk = self._chunk_at(chunk.index + 1, chunk.stop)

    def commit(self) -> None:
        """Runs the pending context pass now, in a forward of its own. The result is the same."""
        self._branches.commit()

    def cancel(self) -> None:
        """Discards the chunk that is denoised; the stream is as it was before it, bit for bit."""
        for branch in self._branches.branches:
            branch.cancel()

    def set_text(
        self,
        texts: Sequence[Tensor],
        *,
        recache: bool = True,
        recache_sink: bool = False,
        new_shot: bool = False,
    ) -> None:
        """Gives the following chunks another text.

        Args:
            texts: embeddings, (B, text_len, text_dim), the same on all ranks: one for each of the next chunks, of which
                the last holds from there on.
            recache: whether the keys and values of the window are computed anew under each text, from its clean
                latents, chunk by chunk. Without, those of the chunks so far stay as they are.
            recache_sink: whether those of the sink are computed anew too.
            new_shot: whether the next frames become the sink, in place of the present one.

        Raises:
            ConfigError: embeddings do not fit the model, or differ between ranks.
        """
        for embeds in texts:
            check_text(self._model, embeds, self._context.grid)
            self._agree("text", embeds)
        first, *later = texts
        self._change_text(first, recache, recache_sink)
        self._texts = [(embeds, recache, recache_sink) for embeds in later]
        if new_shot:
            for each in self._branches.branches:
                cache = each.stream.cache
                cache.window = cache.window.shot(self._position[1])

    def _change_text(self, embeds: Tensor, recache: bool, recache_sink: bool) -> None:
        branch = self._branches.branch(CONDITIONAL)
        if branch is None:
            return
        if not recache or (not recache_sink and self._newest_is_sink(branch)):
            branch.commit()
        branch.stream.set_text(embeds)
        if recache:
            self._recompute(branch, with_sink=recache_sink)

    def rewind(self, chunks: int, embeds: Tensor) -> bool:
        """Takes the last chunks back.

        Args:
            chunks: how many, at most `chunks_made`.
            embeds: the text that held when the chunk before them was made.

        Returns:
            Whether the stream is as it was, bit for bit. If not, its cache was computed anew from the clean latents
            that are kept.

        Raises:
            ConfigError: no latents are kept from which to go on.
        """
        first = self._position[0] - chunks
        before, start = self._rewind_to(first)
        self._texts = []
        self.kept.drop(start)
        self.next_chunk, exact = self._chunk_at(first, start), True
        conditional = self._branches.branch(CONDITIONAL)
        if conditional is not None:
            conditional.stream.set_text(embeds)
        for branch in self._branches.branches:
            stream = branch.stream
            window = stream.cache.window.before(start)
            if before is not None and stream.cache.can_rewind(before.chunk):
                branch.rewind(before, window)
            else:
                exact = before is None
                stream.cache.window = window.since(0, 0)  # all that is kept can be written again
                self._recompute(branch, with_sink=True)
        return exact

    def check_rewind(self, chunks: int) -> None:
        """Raises ConfigError if so many chunks cannot be taken back."""
        self._rewind_to(self._position[0] - chunks)

    def newest_latents(self, first: int, most: int) -> Tensor:
        """Returns the newest clean latents that are kept, (B, F, C, H, W), whole, on every rank. All ranks must call.

        Args:
            first: the global time index before which none are wanted.
            most: the most frames to return.
        """
        parts = list(self.kept.newest())
        tokens = torch.cat([part.tokens_BFSE for part in parts], 1)[:, -most:]
        tokens = tokens[:, -max(1, parts[-1].chunk.stop - first) :]
        grid = self._context.grid
        return grid.unpatchify(self._parallel.gather_tokens(tokens.contiguous(), grid))

    def _rewind_to(self, first: int) -> tuple[Part | None, int]:
        """The chunk before the chunk `first`, and where that one starts."""
        if first == 0:
            return None, 0
        before = self.kept.part(first - 1)
        if before is None:
            raise ConfigError(f"cannot rewind to chunk {first - self._first_chunk}: its latents are not kept any more")
        return before, before.chunk.stop

    def fork(self, noise: Noise | None = None) -> ChunkLoop:
        """Returns a stream that goes on from here by itself.

        Args:
            noise: its noise; None takes this stream's.
        """
        fork = copy.copy(self)
        fork._branches, fork.kept, fork._texts = self._branches.fork(), self.kept.fork(), list(self._texts)
        if noise is not None:
            fork._noise, fork._drawn = noise, False
        return fork

    def _newest_is_sink(self, branch: GuidanceBranch) -> bool:
        """Whether frames of the newest chunk stay in the window as its sink."""
        last = self.kept.last
        if last is None:
            return False
        return last.chunk.start < branch.stream.cache.window.sink_at(last.chunk.stop).stop

    def _recompute(self, branch: GuidanceBranch, *, with_sink: bool) -> None:
        """Computes the cache of a branch anew from what is kept of its window; the newest chunk stays pending."""
        window, stop = branch.stream.cache.window, self._position[1]
        parts = self.kept.within(window, stop, with_sink=with_sink)
        branch.recompute(parts, window.since(oldest_of(parts, window, stop), stop), stop)

    def _commit_initial(self, latents_BFCHW: Tensor) -> None:
        """Runs the context passes of the initial latents; that of the last chunk stays pending."""
        for chunk in self._cut(self._initial, 0, 0):
            self.commit()
            self.finish(chunk, self._context.tokens(latents_BFCHW[:, chunk.start : chunk.stop]))

    def _chunk_at(self, index: int, start: int) -> Chunk | None:
        """The chunk with this number, which starts at a global time index; None behind the end of the video."""
        stop = None if self._frames is None else self._initial + self._frames
        return next(self._cut(None if stop is None else stop - start, index, start), None)

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
