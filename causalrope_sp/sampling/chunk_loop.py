"""The autoregressive loop over one stream of latents: its state between two chunks, and the making of the next one.

Shapes: B batch, F latent frames of a chunk, C channels, H×W latent size, s tokens of a frame on this rank,
E numbers in a token.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from causalrope_sp.cache.layer_storage import STORED_DTYPES
from causalrope_sp.diffusion.noise import Noise
from causalrope_sp.diffusion.schedule import add_noise, branch_timesteps, guided_steps, model_timesteps, sigmas
from causalrope_sp.diffusion.solvers import start_solver
from causalrope_sp.distributed import SequenceParallel
from causalrope_sp.errors import ConfigError
from causalrope_sp.grid import Chunk, LatentGrid, split_into_chunks
from causalrope_sp.models.causal_dit import CausalDiT
from causalrope_sp.planning.counts import head_imbalance
from causalrope_sp.planning.strategy import layout_of_stream
from causalrope_sp.planning.workload import Workload
from causalrope_sp.reuse.policy import ReusePlan
from causalrope_sp.sampling.agreement import agree_on_strategy, digest
from causalrope_sp.sampling.chunk import LatentChunk, ShardContext, check_image, check_text
from causalrope_sp.sampling.chunk_control import check_taken, shared_control
from causalrope_sp.sampling.finite_chunks import FiniteCheck, check_finite
from causalrope_sp.sampling.guidance import UNCONDITIONAL, GuidanceBranches, Step, check_guidance
from causalrope_sp.sampling.kept_latents import KeptLatents
from causalrope_sp.sampling.pass_graphs import stream_graphs
from causalrope_sp.sampling.pass_inputs import Part
from causalrope_sp.sampling.recompute import recompute_all, recompute_for
from causalrope_sp.sampling.settled import settle
from causalrope_sp.sampling.similar_frames import stream_similarity
from causalrope_sp.sampling.stream import CausalStream
from causalrope_sp.sampling.stream_options import Resumed, StreamOptions, check_attention, check_length, window_of


class ChunkLoop:
    """One stream of latents. It takes the arguments of `sample_chunks`.

    Attributes:
        model: the DiT.
        noise: starting and fresh noise; `drawn` tells whether ranks have compared it.
        options: the options of the stream.
        parallel: the ranks.
        layout: how they share attention.
        rings: the rings of the KV cache, and where the heads are.
        context: converts latents to this rank's tokens.
        branches: the streams of guidance.
        first_chunk: the number of the first chunk that was not given as initial latents.
        next_chunk: the chunk that `step` makes next; None after the last one.
        kept: the clean latents from which the cache can be computed anew.
        settle: settles how each model is computed, with its weights of now.
        settled: how each model is computed.
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
        check_length(frames, options.stream)
        check_attention(options.stream, parallel.attention)
        check_text(model, embeds, grid)
        check_finite("negative text embeddings", options.negative_embeds)
        check_image(model, options.image_embeds, len(embeds))
        if options.control is not None:
            check_taken(model.config.control_channels, options.control)
        self.model, self._opened_with = model, (model.device, model.dtype)
        self.parallel, self.options, self.noise, self._frames = parallel, options, noise, frames
        self.context = ShardContext.of(model, grid, parallel.shard(grid), len(embeds))
        self.context.check_initial(options.initial_latents)
        self._initial = 0 if options.initial_latents is None else options.initial_latents.shape[1]
        if options.resumed is not None:
            self._initial = options.resumed.initial_frames
        most = next(self._cut(None, 0, 0)).frames
        self._given = self.context.given_tokens(options.given_frames, self._initial, most)
        self._first_step = 0 if options.source is None else options.source.first_step
        steps = len(options.sampler.steps)
        if not 0 <= self._first_step < steps:
            raise ConfigError(f"a source starts at one of the steps 0 to {steps - 1}, not at {self._first_step}")
        if options.sampler.first_steps and (options.source is not None or options.reuse is not None):
            raise ConfigError("a sampler with first_steps redraws no video and reuses no outputs: give `steps` alone")
        if options.low_noise is not None and options.reuse is not None:
            raise ConfigError("reuse must be None where two models share the steps: neither makes all of them")
        check_guidance(options.sampler, parallel.mesh.cfg)
        if parallel.mesh.chunk > 1:
            raise ConfigError(f"chunk {parallel.mesh.chunk} of the mesh is for chunks made in parallel alone")
        self.branches = self._open(model, embeds)
        self.drawn = False
        self.unread: FiniteCheck | None = None  # of the newest chunk
        window, more = options.stream.window, max(options.history, options.kept_chunks) * options.stream.chunk_frames
        self.kept = KeptLatents(None if window is None else window + more)
        self.next_chunk = self.chunk_at(0, 0)
        self.first_chunk = len(list(self._cut(self._initial, 0, 0)))
        if options.resumed is not None:
            self._take_over(options.resumed)
        elif options.initial_latents is not None:
            self._commit_initial(options.initial_latents)

    def _open(self, model: CausalDiT, embeds: Tensor) -> GuidanceBranches:
        """Chooses the strategy, checks that all ranks chose the same, and opens the conditional and, with guidance, the
        unconditional stream."""
        options, grid, config = self.options, self.context.grid, model.config
        stream, sampler, reuse = options.stream, options.sampler, options.reuse
        if reuse is not None:
            reuse.check(model_timesteps(sampler), config.num_layers)
        window = window_of(stream, self._frames, self._initial)
        batch, itemsize = len(embeds), model.dtype.itemsize
        work = Workload.of(config, grid, stream, sampler, window.frames, batch, itemsize, reuse)
        agreed: dict[str, object] = {"sampler": sampler, "reuse": reuse, "frames": self._frames, "stream": stream}
        agreed["graphs"] = options.graphs
        if self.parallel.denoisers.size > 1:  # two streams that are taken in another order on one rank differ in these
            tensors = {"text": embeds, "negative text": options.negative_embeds, "latents": options.initial_latents}
            tensors |= {"given frames": options.given_frames, "image tokens": options.image_embeds}
            agreed |= {name: digest(x) for name, x in tensors.items() if x is not None}
        self.layout = layout_of_stream(work, self.parallel, options.layout)
        self.rings = work.head_rings(self.layout.ulysses)
        self.head_imbalance = head_imbalance(self.layout, work)
        strategy = agree_on_strategy(self.parallel, work, self.layout, agreed)
        relative = stream.rope == "relative"
        models = [model] if options.low_noise is None else [model, options.low_noise.model]
        self.settle = lambda: tuple(settle(each, strategy.backend) for each in models)
        self.settled = options.settled or self.settle()
        sharing = self.parallel.sp_communicator() if self.parallel.mesh.sp > 1 else None
        graphs = stream_graphs(model.device, sharing) if options.graphs else None
        total = window.frames if self._frames is None else self._initial + self._frames
        similar = stream_similarity(config, stream, window, self._cut(total, 0, 0), options.history, sharing)

        def open_stream(prompt: Tensor, branch: int, number: int) -> CausalStream:
            passes = branch_timesteps(sampler, branch == UNCONDITIONAL, self._first_step)
            plan = None if reuse is None else ReusePlan.of_causal(reuse, passes, config.num_layers)
            shard = self.context.shard
            return CausalStream(
                models[number],
                prompt,
                grid,
                window,
                shard,
                strategy,
                relative=relative,
                quantized=STORED_DTYPES.get(stream.cache),
                reuse=plan,
                graphs=graphs,
                history=options.history,
                settled=self.settled[number],
                image_BNI=options.image_embeds,
                given=0 if self._given is None else self._given.shape[1],
                similar=None if similar is None else similar.fork(),
            )

        return GuidanceBranches(open_stream, embeds, options.negative_embeds, sampler, self.parallel, len(models))

    @property
    def chunks_made(self) -> int:
        """How many chunks were made and not taken back."""
        return self.position[0] - self.first_chunk

    @property
    def position(self) -> tuple[int, int]:
        """The number of the next chunk and the global time index of its first frame."""
        last = self.kept.last
        return (0, 0) if last is None else (last.chunk.index + 1, last.chunk.stop)

    def step(self, control: Tensor | None = None) -> LatentChunk:
        """Makes the next chunk. If this is cut short, by an error or by the user, the stream is where it was.

        Args:
            control: the control of the chunk, of the shape that `StreamOptions.control` returns; None takes what that
                returns.

        Returns:
            The chunk, on every rank.

        Raises:
            StopIteration: the video is complete.
            ConfigError: control, noise or source do not fit, the model was moved or cast, or the latents of the chunk
                before are not finite.
        """
        chunk = self.next_chunk
        if chunk is None:
            raise StopIteration
        control_BFSE = self.control_of(chunk, control)
        try:
            tokens = self.denoise(chunk, control_BFSE)
            output = self.output(chunk, tokens)
        except BaseException:
            self.cancel()
            raise
        self.finish(chunk, tokens, control_BFSE)
        return output

    def control_of(self, chunk: Chunk, given: Tensor | None) -> Tensor | None:
        """Returns this rank's control of a chunk, (B, F, s, E); None for a model that takes none. See `step`."""
        channels, source = self.model.config.control_channels, self.options.control
        if not channels and given is None:
            return None
        generated = Chunk(chunk.index - self.first_chunk, chunk.start - self._initial, chunk.frames)
        ask = None if given is not None or source is None else partial(source, generated)
        return shared_control(self.parallel, self.context, channels, chunk.frames, ask or (lambda: given))

    def denoise(self, chunk: Chunk, control_BFSE: Tensor | None = None) -> Tensor:
        """Denoises a chunk and returns its clean tokens on this rank, (B, F, s, E)."""
        sampler = self.options.sampler
        guided = any(guided_steps(sampler))
        if chunk.index == self.first_chunk:
            sampler = sampler.first_chunk
        levels, timesteps = sigmas(sampler), model_timesteps(sampler)
        self._check_model()
        self._renew_window(chunk)
        x = self._draw(chunk, self._first_step)
        if self.options.source is not None:
            clean = self.options.source.latents(chunk)
            self.agree(f"source of chunk {chunk.index}", clean)
            clean = self.context.checked_tokens(f"the source of chunk {chunk.index}", chunk.frames, clean)
            x = add_noise(clean, x, levels[self._first_step])
        solve = start_solver(sampler, self._first_step)
        is_guided = [guided and each for each in guided_steps(sampler)]
        for step, sigma in enumerate(levels[self._first_step :], self._first_step):
            x = self._with_given(chunk, x)
            of = Step(timesteps[step], is_guided[step], self.options.model_of(timesteps[step]))
            velocity = self.branches.velocity(chunk, x, of, control_BFSE)
            to = levels[step + 1] if step + 1 < len(levels) else 0.0
            x = solve(x, velocity, sigma, to, partial(self._draw, chunk, step + 1))
            if self.options.on_step is not None:
                on_step = partial(self.options.on_step, chunk, step, timesteps[step])
                self.parallel.denoisers.run_collectively(on_step)
        if self.unread is not None:
            self.unread.read()
        self.commit()  # of a model that made none of the steps
        return self._with_given(chunk, x)

    def _with_given(self, chunk: Chunk, x_BFSE: Tensor) -> Tensor:
        """Puts the given frames into the tokens of the first chunk."""
        if self._given is None or chunk.start > 0:
            return x_BFSE
        return torch.cat([self._given, x_BFSE[:, self._given.shape[1] :]], 1)

    def _renew_window(self, chunk: Chunk) -> None:
        """Computes anew what a chunk will attend, if the stream's policy is to. If that is cut short, all that is kept
        is computed anew, so that the stream can go on."""
        if self.options.stream.window_policy != "recomputed":
            return
        for branch in self.branches.branches:
            try:
                recompute_for(branch, self.kept, chunk)
            except BaseException:
                recompute_all(branch, self.kept, chunk.start)
                raise

    def _check_model(self) -> None:
        """Raises ConfigError if the model was moved or cast under the stream."""
        now = self.model.device, self.model.dtype
        if now != self._opened_with:
            ways = " and ".join(f"{dtype} on {device}" for device, dtype in (self._opened_with, now))
            raise ConfigError(f"the model of an open stream was moved or cast: {ways}; do so between two streams")

    def output(self, chunk: Chunk, tokens_BFSE: Tensor) -> LatentChunk:
        """Gathers the whole latents of a chunk on every rank."""
        self.parallel.comm_stats.keep(self.branches.stored_bytes, self.head_imbalance)
        grid = self.context.grid
        latents = grid.unpatchify(self.parallel.gather_tokens(tokens_BFSE, grid))
        self.unread = FiniteCheck(chunk.index, latents, self.model.dtype)
        return LatentChunk(chunk, latents, self.unread)

    def finish(self, chunk: Chunk, tokens_BFSE: Tensor, control_BFSE: Tensor | None) -> None:
        """Keeps a chunk's clean tokens for its context pass, which runs with the next chunk's first denoise pass."""
        part = Part(chunk, tokens_BFSE, 0.0, control_BFSE)
        self.branches.finish(part)
        self.kept.add(part, self.branches.branches[0].stream.cache.window)
        self.next_chunk = self.chunk_at(chunk.index + 1, chunk.stop)

    def tensors(self) -> Iterator[Tensor]:
        """Yields what the stream keeps between two chunks."""
        for branch in self.branches.branches:
            yield from branch.stream.tensors()
        yield from (x for part in self.kept for x in (part.tokens_BFSE, part.control_BFSE) if x is not None)
        yield from () if self.options.negative_embeds is None else (self.options.negative_embeds,)

    def commit(self) -> None:
        """Runs the pending context pass now, in a forward of its own. The result is the same."""
        self.branches.commit()

    def cancel(self) -> None:
        """Discards the chunk that is denoised; the stream is as it was before it, bit for bit."""
        for branch in self.branches.branches:
            branch.cancel()

    def _commit_initial(self, latents_BFCHW: Tensor) -> None:
        """Runs the context passes of the initial latents; that of the last chunk stays pending."""
        config = self.model.config
        for chunk in self._cut(self._initial, 0, 0):
            self.commit()
            tokens = self.context.tokens(latents_BFCHW[:, chunk.start : chunk.stop])
            zeros = tokens.new_zeros(*tokens.shape[:3], config.embedded_dim - config.token_dim)
            self.finish(chunk, tokens, zeros if config.control_channels else None)

    def _take_over(self, resumed: Resumed) -> None:
        """Keeps what was made before; the caches hold nothing of it."""
        for branch in self.branches.branches:
            branch.stream.cache.window = replace(branch.stream.cache.window, shots=resumed.shots)
        lengths = [chunk.frames for chunk, _ in resumed.kept]
        controls = [None] * len(lengths) if resumed.control is None else resumed.control.split(lengths, 1)
        for (chunk, latents), control in zip(resumed.kept, controls, strict=True):
            part = Part(
                chunk, self.context.tokens(latents), 0.0, None if control is None else self.context.tokens(control)
            )
            self.kept.add(part, self.branches.branches[0].stream.cache.window)
        self.next_chunk = self.chunk_at(*self.position)

    def chunk_at(self, index: int, start: int) -> Chunk | None:
        """The chunk with this number, which starts at a global time index; None behind the end of the video."""
        stop = None if self._frames is None else self._initial + self._frames
        return next(self._cut(None if stop is None else stop - start, index, start), None)

    def _draw(self, chunk: Chunk, step: int) -> Tensor:
        noise = self.noise(chunk, step)
        if not self.drawn:
            self.agree("noise", noise)
            self.drawn = True
        return self.context.checked_tokens(f"the noise of chunk {chunk.index}", chunk.frames, noise)

    def agree(self, name: str, x: Tensor) -> None:
        """Checks that a tensor is the same on all ranks that denoise."""
        if self.parallel.denoisers.size > 1:
            self.parallel.denoisers.agree({name: digest(x)})

    def _cut(self, frames: int | None, index: int, start: int) -> Iterator[Chunk]:
        lone = self.options.stream.independent_first_frame
        return split_into_chunks(
            frames, self.options.stream.chunk_frames, independent_first_frame=lone, index=index, start=start
        )
