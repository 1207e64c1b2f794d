"""The state of one stream, and the two operations on a chunk: denoise and commit.

Shapes: B batch, F frames of a chunk, s tokens of a frame that this rank owns, E numbers in a token.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from causalrope_kernels import Keys, PassOperations, Projection, Rotation
from causalrope_kernels.backend import use_triton
from causalrope_sp.attention.base import Strategy
from causalrope_sp.cache.kv_cache import KVCache
from causalrope_sp.cache.window import SlidingWindow
from causalrope_sp.devices import send
from causalrope_sp.grid import Chunk, LatentGrid, Shard
from causalrope_sp.models.block import ForwardPass, TextContext
from causalrope_sp.models.causal_dit import CausalDiT
from causalrope_sp.models.modulation import PassModulation
from causalrope_sp.models.rope import RotaryTables
from causalrope_sp.reuse.output_store import OutputOf, OutputStore, computed
from causalrope_sp.reuse.policy import ReusePlan
from causalrope_sp.sampling.pass_graphs import PassGraphs
from causalrope_sp.sampling.settled import SettledWeights, settle
from causalrope_sp.sampling.similar_frames import Choice, SimilarFrames

MOST_TIMES = 8  # of a stream that are kept: all of a few-step model's

Time = tuple[Tensor, PassModulation]  # the timesteps of a pass on the device, and what the model computes of them


@dataclass(frozen=True)
class Part:
    """One chunk in a forward.

    Args:
        chunk: its number, start and length.
        tokens_BFSE: its tokens on this rank.
        timestep: their noise level, in [0, 1000]; 0 for a context pass.
        control_BFSE: the control of these tokens, for a model that takes one.
    """

    chunk: Chunk
    tokens_BFSE: Tensor
    timestep: float
    control_BFSE: Tensor | None = None

    def cut(self, start: int, frames: int) -> Part:
        """Returns so many frames of this part, from the global time index `start` on."""
        first = start - self.chunk.start
        tokens, control = (
            None if x is None else x[:, first : first + frames] for x in (self.tokens_BFSE, self.control_BFSE)
        )
        assert tokens is not None, "a part has tokens"
        return Part(Chunk(self.chunk.index, start, frames), tokens, self.timestep, control)


class CausalStream:
    """A model bound to a prompt, a KV cache and a strategy.

    Args:
        model: the DiT.
        embeds_BLE: text embeddings, (B, text_len, text_dim), zeros after the text's end.
        grid: the latent frame in tokens.
        window: how far back attention looks, in latent frames.
        shard: the tokens of a frame that this rank owns.
        strategy: how attention crosses ranks.
        relative: rotate by a frame's position within the window instead of its global time index.
        reuse: which outputs a chunk's denoise passes take over from earlier ones; None computes all of them.
        graphs: runs passes by captured graphs; None runs them eagerly.
        quantized: the dtype of 8 bits that keys and values are stored in; None stores them in the model's.
        history: how many committed chunks `rewind` can take back.
        settled: what `settle` returns for the model and the strategy's backend; None calls it.
        image_BNI: image tokens, (B, N, image_dim), for a model that has them.
        given: the frames whose global time index is below this number are clean in every pass, at timestep 0.
        similar: chooses the frames of the window that chunks attend; None for all.
    """

    def __init__(
        self,
        model: CausalDiT,
        embeds_BLE: Tensor,
        grid: LatentGrid,
        window: SlidingWindow,
        shard: Shard,
        strategy: Strategy,
        *,
        relative: bool = False,
        reuse: ReusePlan | None = None,
        graphs: PassGraphs | None = None,
        quantized: torch.dtype | None = None,
        history: int = 0,
        settled: SettledWeights | None = None,
        image_BNI: Tensor | None = None,
        given: int = 0,
        similar: SimilarFrames | None = None,
    ) -> None:
        config = model.config
        self._given = given
        self._model = model
        self._strategy = strategy
        self._text = model.encode_text(embeds_BLE, image_BNI)
        self._image_BNI = image_BNI
        compute = torch.float64 if model.dtype == torch.float64 else torch.float32
        self._rope = RotaryTables(config.head_dim, config.theta, shard, model.device, compute)
        self._relative = relative
        self._rotation: tuple[tuple[Chunk, ...], Rotation] | None = None
        self._times: dict[tuple[float, ...], Time] = {}
        self._broken = False
        self._unchecked, self._settled = settled or settle(model, strategy.backend)
        self._checked_kinds: set[tuple[int, ...]] = set()  # of passes, by the frames of their chunks
        self._graphs = graphs
        # Triton reads on the device which keys are attended, so one graph serves a window that fills or rotates; `auto`
        # takes it where keys are rotated on read, and for chunks whose heads attend different frames
        auto = strategy.backend == "auto" and use_triton("auto", model.patch_embedding.weight.detach())
        self._rows_on_device = strategy.backend == "triton" or (auto and relative)
        self._choice_on_device = strategy.backend == "triton" or auto
        self.outputs = None if reuse is None else OutputStore(reuse, stays=graphs is not None)
        self._quantized = quantized
        self.cache = self._new_cache(len(embeds_BLE), window, history)
        self._similar = similar
        self._choose_frames()

    def _new_cache(self, batch: int, window: SlidingWindow, history: int) -> KVCache:
        model, config, strategy = self._model, self._model.config, self._strategy
        tokens = strategy.stored_tokens
        return KVCache(
            config.num_layers,
            batch,
            window,
            tokens,
            strategy.stored_heads,
            config.head_dim,
            dtype=model.dtype,
            device=model.device,
            quantized=self._quantized,
            history=history,
            cached=strategy.cached,
            rotate_on_read=partial(self._rope.rotate_on_read, tokens=tokens) if self._relative else None,
        )

    @property
    def text(self) -> TextContext:
        """What every layer's cross-attention reads."""
        return self._text

    @property
    def strategy(self) -> Strategy:
        """How attention crosses ranks."""
        return self._strategy

    def with_strategy(self, strategy: Strategy) -> CausalStream:
        """Returns a stream of the same text and window with another strategy. It has a cache of its own that holds
        nothing, runs eagerly, reuses nothing, and cannot be taken back."""
        other = copy.copy(self)
        other._strategy, other._rotation, other._graphs, other.outputs = strategy, None, None, None
        other._similar = None
        other.cache = other._new_cache(self._text[0].text.k.shape[0], self.cache.window, 0)
        return other

    def denoise(
        self,
        chunk: Chunk,
        x_BFSE: Tensor,
        timestep: float,
        context: Part | None = None,
        control_BFSE: Tensor | None = None,
    ) -> Tensor:
        """Predicts the velocity of the open chunk's tokens.

        With `context` the chunk before it is committed in the same forward: its clean tokens attend the window up to
        their own chunk, the noisy tokens attend the window up to theirs, which includes the clean keys and values
        written in this forward.

        Args:
            chunk: the chunk to denoise; it is opened if it is not open yet.
            x_BFSE: its noisy tokens on this rank.
            timestep: their noise level, in [0, 1000].
            context: the clean tokens of the chunk before, if its context pass is pending.
            control_BFSE: the control of the chunk, for a model that takes one.

        Returns:
            The velocity, (B, F, s, E), in the dtype of `x_BFSE`.

        Raises:
            RuntimeError: an earlier forward of this stream did not finish.
        """
        if context is not None:
            self._open(context.chunk)
            self.cache.commit()
        self._open(chunk)
        noisy = Part(chunk, x_BFSE, timestep, control_BFSE)
        parts = [noisy] if context is None else [context, noisy]
        if self.outputs is None:
            return self._forward(parts)
        output = self.outputs.next_pass(chunk, x_BFSE.shape[1] * x_BFSE.shape[2])
        return self._forward(parts, output, self.outputs.pattern)

    def commit(self, context: Part) -> None:
        """Runs a context pass in a forward of its own: writes a chunk's clean keys and values and commits them."""
        self._open(context.chunk)
        self._forward([context])
        self.cache.commit()

    def cancel(self, pending: Chunk | None = None) -> None:
        """Discards the open chunk, also after a forward that was cut short.

        Args:
            pending: the chunk whose context pass ran with the open chunk's first pass and must run again; None if
                the stream is to be as it was after the last commit.
        """
        begun = pending is not None and self.cache.committed == pending.stop
        if pending is None or begun:
            self.cache.cancel()
        if pending is not None and begun:
            self.cache.reopen(pending)
        self._forget_chunk()

    def rewind(self, chunk: Chunk, window: SlidingWindow) -> None:
        """Takes chunks back until a committed one is open again, whose context pass must run again.

        Args:
            chunk: that chunk; the cache's `can_rewind` returns True for it.
            window: the window at that time.
        """
        self.cache.rewind(chunk, window)
        self._forget_chunk()

    def restart(self, window: SlidingWindow, committed: int) -> None:
        """Forgets all frames that a window does not hold before the frame `committed`, at which the next chunk starts.

        Args:
            window: the new window, of the same size.
            committed: a global time index.
        """
        self.cache.restart(window, committed)
        if self._similar is not None:
            self._similar.clear()
        self._forget_chunk()

    def set_text(self, embeds_BLE: Tensor) -> None:
        """Gives the following passes another text.

        Args:
            embeds_BLE: text embeddings, (B, text_len, text_dim).
        """
        text = self._model.encode_text(embeds_BLE, self._image_BNI)
        if self._graphs is None:
            self._text = text
            return
        for own, new in zip(self._text, text, strict=True):  # captured graphs read the text where it is
            for place, keys in zip(own, new, strict=True):
                if place is not None and keys is not None:
                    place.k.copy_(keys.k)
                    place.v.copy_(keys.v)

    def renew_weights(self, settled: SettledWeights, embeds_BLE: Tensor) -> None:
        """Goes on with weights of the model that have changed in place, between two chunks. The cache keeps its keys
        and values, and captured graphs read the weights where they are.

        Args:
            settled: what `settle` returns for the model as it is now.
            embeds_BLE: the embeddings of the present text, (B, text_len, text_dim).
        """
        self._unchecked, self._settled = settled
        self._times.clear()
        self.set_text(embeds_BLE)

    def fork(self) -> CausalStream:
        """Returns a stream that goes on from here by itself, between two chunks. The caches share what both keep."""
        fork = copy.copy(self)
        fork.cache, fork._rotation = self.cache.fork(), None
        if self._similar is not None:
            fork._similar = self._similar.fork()
            fork._choose_frames()
        fork.outputs = None if self.outputs is None else OutputStore(self.outputs.plan, stays=self._graphs is not None)
        if self._graphs is not None:
            fork._graphs = self._graphs.fork()
            fork._text = [own._replace(text=_copied(own.text)) for own in self._text]
        return fork

    def tensors(self) -> Iterator[Tensor]:
        """Yields what the stream keeps between two chunks: its cache, and the keys and values of the text."""
        yield from self.cache.tensors()
        yield from (x for own in self._text for keys in own if keys is not None for x in (keys.k, keys.v))

    def close(self) -> None:
        """Tells forks that this stream makes no more passes."""
        self.cache.release()

    def _forget_chunk(self) -> None:
        self._broken, self._rotation = False, None
        if self.outputs is not None:
            self.outputs.clear()

    @property
    def stored_bytes(self) -> int:
        """The largest number of bytes that reused outputs occupied at once."""
        return 0 if self.outputs is None else self.outputs.most_bytes

    def _open(self, chunk: Chunk) -> None:
        if self.cache.open_chunk != chunk:
            self.cache.open(chunk)
            if self._similar is not None:
                self._similar.begin(chunk)

    def _observed_by(self, parts: Sequence[Part]) -> SimilarFrames | None:
        """What sums up the queries and keys of a pass: of context passes, and of a chunk's first pass."""
        similar = self._similar
        if similar is None or (parts[0].timestep and not similar.awaits(parts[-1].chunk)):
            return None
        return similar

    def _choose(self, similar: SimilarFrames, parts: Sequence[Part]) -> None:
        """Keeps what a pass has summed up, and chooses the frames that later passes of its last chunk attend."""
        batch, frames = len(parts[0].tokens_BFSE), sum(part.chunk.frames for part in parts)
        if not parts[0].timestep:
            similar.keep_keys(parts[0].chunk, batch, frames)
        if parts[-1].timestep and similar.awaits(parts[-1].chunk):
            similar.decide(parts[-1].chunk, batch, frames, self.cache.window)
            self.cache.restart_plans()

    def _choose_frames(self) -> None:
        """Lets the cache ask which frames a chunk attends, with the heads that this rank caches."""
        similar = self._similar
        if similar is None:
            return
        heads = self._strategy.heads_cached(self._model.config.num_heads)

        def choose(chunk: Chunk) -> Choice | None:
            choice = similar.choose(chunk)
            return choice and [[of_layer[head] for head in heads] for of_layer in choice]

        self.cache.choose_frames(choose)

    def _forward(self, parts: list[Part], output: OutputOf = computed, pattern: Hashable = None) -> Tensor:
        if self._broken:
            raise RuntimeError("a forward of this stream was cut short, its cache is half written: cancel the chunk")
        model, chunks = self._model, tuple(part.chunk for part in parts)
        time = self._time(parts)
        tokens_BTE = torch.cat([self._embedded(part) for part in parts], 1).flatten(1, 2).to(model.dtype)
        observed = self._observed_by(parts)
        operations = self._operations(tuple(chunk.frames for chunk in chunks))
        compute = partial(self._compute, chunks, operations, output, observed)
        self._broken = True
        if self._graphs is None:
            velocity = compute(tokens_BTE, time, self._rotate(chunks))
        else:
            velocity = self._by_graph(self._graphs, chunks, compute, tokens_BTE, time, (pattern, observed is None))
        if observed is not None:
            self._choose(observed, parts)
        self._broken = False
        last = parts[-1].tokens_BFSE
        return velocity.view(last.shape).to(last.dtype)

    def _embedded(self, part: Part) -> Tensor:
        """What the patch embedding reads of a part: its tokens, with the control behind the latents' channels."""
        if part.control_BFSE is None:
            return part.tokens_BFSE
        pixels = math.prod(self._model.config.patch_size)
        both = [x.unflatten(-1, (pixels, -1)) for x in (part.tokens_BFSE, part.control_BFSE)]
        return torch.cat(both, -1).flatten(-2)

    def _compute(
        self,
        chunks: tuple[Chunk, ...],
        operations: PassOperations,
        output: OutputOf,
        observed: SimilarFrames | None,
        tokens_BTE: Tensor,
        time: Time,
        rotation: Rotation,
    ) -> Tensor:
        """Runs the model on the tokens of some chunks; returns the velocity of the last one.

        Without gradients the operations are those of the first block; the others have the same shapes and no checks.
        """
        later, settled = self._unchecked, self._settled
        if operations is not later:
            settled = settled._replace(blocks=[self._model.first_block.settled(operations), *settled.blocks[1:]])
            if torch.is_grad_enabled():
                later, settled = operations, self._model.settled(operations)

        def attend(layer: int, projection: Projection) -> Tensor:
            own = later if layer else operations
            if observed is not None:
                observed.observe(layer, projection, own)
            return self._strategy.attend(projection, self.cache.layer(layer), chunks, own).flatten(1, 2)

        step = ForwardPass(
            timesteps_F=time[0],
            predicted_frames=chunks[-1].frames,
            rotation=rotation,
            text=self._text,
            attend=attend,
            operations=operations,
            settled=settled,
            output=output,
            modulation=time[1],
        )
        return self._model(tokens_BTE, step)

    def _by_graph(
        self,
        graphs: PassGraphs,
        chunks: tuple[Chunk, ...],
        compute: Callable[[Tensor, Time, Rotation], Tensor],
        tokens_BTE: Tensor,
        time: Time,
        pattern: Hashable,
    ) -> Tensor:
        """Runs a pass by a captured graph, if its kind has one; `pattern` says which outputs it reuses and keeps, and
        whether similar frames are chosen by it."""
        rotation, since = self._rotate(chunks), self._strategy.splits_at(chunks)
        if not self.cache.offsets.are_set:  # which this pass does, on the host
            return compute(tokens_BTE, time, rotation)
        if self.cache.evicts(chunks[0]):  # its clean keys and values are saved layer by layer as they are written
            graphs.refuse("a chunk overwrites the frames of the chunk before it, whose context pass it shares")
            return compute(tokens_BTE, time, rotation)
        chosen = [self.cache.are_chosen(chunk) for chunk in chunks]
        if any(chosen) and not self._choice_on_device:
            graphs.refuse("this attention backend reads on the host which frames are similar")
            return compute(tokens_BTE, time, rotation)
        times = rotation.query_times_F, rotation.key_times_F
        timesteps_F, modulation = time
        vectors = modulation.blocks_L6FD, modulation.head_2FD
        inputs = [tokens_BTE, *vectors, *times, *self.cache.begin_graph(chunks, since)]

        def forward(inputs: Sequence[Tensor]) -> Tensor:
            tokens, blocks, head, query_times, key_times, *slots = inputs
            key_times = query_times if times[0] is times[1] else key_times
            with self.cache.reading(chunks, since, slots):
                own_rotation = replace(rotation, query_times_F=query_times, key_times_F=key_times)
                own_modulation = replace(modulation, blocks_L6FD=blocks, head_2FD=head)
                return compute(tokens, (timesteps_F, own_modulation), own_rotation)

        rows = tuple(self.cache.attended_rows(chunk, since) for chunk in chunks)
        attended = tuple(
            tuple(map(len, sides)) if self._rows_on_device or by_head else sides
            for sides, by_head in zip(rows, chosen, strict=True)
        )
        frames = tuple(chunk.frames for chunk in chunks)
        # the table of times is replaced by a longer one when the stream outgrows it
        shapes = tokens_BTE.shape, vectors[0].shape  # timesteps differ within a chunk where frames of it are given
        kind = self.cache, self.cache.storages, attended, frames, shapes, len(rotation.time), pattern
        # a hook sees passes, which a graph hides
        hooked = "the model has hooks" if self._model._forward_pre_hooks or self._model._forward_hooks else None
        return graphs.run(kind, chunks[-1].index, inputs, forward, self.cache.restore_evicted, hooked)

    def _operations(self, kind: tuple[int, ...]) -> PassOperations:
        """Returns operations that check their arguments for the first pass of a kind, and others for later ones."""
        if torch.is_grad_enabled():
            return PassOperations.checked(self._strategy.backend)
        if kind in self._checked_kinds:
            return self._unchecked
        self._checked_kinds.add(kind)
        return PassOperations.checked(self._strategy.backend, in_place=True)

    def _time(self, parts: list[Part]) -> Time:
        """Returns the timesteps of a pass, one of each chunk if all have the same length and nothing in them is given,
        with their modulation.

        A sampler has few of them, so they are kept.
        """
        timesteps = tuple(part.timestep for part in parts)
        if any(p.chunk.frames != parts[0].chunk.frames or p.chunk.start < self._given for p in parts):
            frames = [(part, frame) for part in parts for frame in range(part.chunk.start, part.chunk.stop)]
            timesteps = tuple(0.0 if frame < self._given else part.timestep for part, frame in frames)
        found = self._times.get(timesteps)
        if found is None:
            # in float32, as Self-Forcing's schedule holds them: at 833.33 the difference shows as 1e-6 in the latents
            timesteps_F = send(torch.tensor(timesteps, dtype=torch.float32), self._model.device)
            found = timesteps_F, self._model.modulation(timesteps_F)
            if len(self._times) < MOST_TIMES and not torch.is_grad_enabled():
                self._times[timesteps] = found
        return found

    def _rotate(self, chunks: tuple[Chunk, ...]) -> Rotation:
        """Returns the rotation of the tokens of a pass, remembered until the chunks change."""
        if self._rotation is None or self._rotation[0] != chunks:
            if self._relative:  # keys are rotated in time on read
                window = self.cache.window
                by_chunk = [(window.positions(chunk), window.slots(chunk)) for chunk in chunks]
                positions = [by_slot[slot] for by_slot, slots in by_chunk for slot in slots]
                rotation = self._rope.rotation(positions, [0] * len(positions))
            else:
                rotation = self._rope.rotation([f for chunk in chunks for f in range(chunk.start, chunk.stop)])
            self._rotation = chunks, rotation
        return self._rotation[1]


def _copied(keys: Keys) -> Keys:
    return replace(keys, k=keys.k.clone(), v=keys.v.clone())
