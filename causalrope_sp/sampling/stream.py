"""The state of one stream, and the two operations on a chunk: denoise and commit.

Shapes: B batch, F frames of a chunk, s tokens of a frame that this rank owns, E numbers in a token.
"""

from __future__ import annotations

import copy
from collections.abc import Hashable, Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from causalrope_kernels import Keys, PassOperations, Projection, Rotation
from causalrope_sp.attention.base import Strategy
from causalrope_sp.cache.kv_cache import KVCache
from causalrope_sp.cache.window import SlidingWindow
from causalrope_sp.grid import Chunk, LatentGrid, Shard
from causalrope_sp.models.block import ForwardPass, TextContext
from causalrope_sp.models.causal_dit import CausalDiT
from causalrope_sp.reuse.output_store import OutputOf, OutputStore, computed
from causalrope_sp.reuse.policy import ReusePlan
from causalrope_sp.sampling.graphed_passes import GraphedPasses
from causalrope_sp.sampling.pass_graphs import PassGraphs
from causalrope_sp.sampling.pass_inputs import Part, PassInputs, Time
from causalrope_sp.sampling.settled import SettledWeights, settle
from causalrope_sp.sampling.similar_frames import SimilarFrames


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
        self._model = model
        self._strategy = strategy
        self._text = model.encode_text(embeds_BLE, image_BNI)
        self._image_BNI = image_BNI
        self._inputs = PassInputs(model, shard, relative=relative, given=given)
        self._broken = False
        self._unchecked, self._settled = settled or settle(model, strategy.backend)
        self._checked_kinds: set[tuple[int, ...]] = set()  # of passes, by the frames of their chunks
        how = {"relative": relative, "quantized": quantized is not None}
        self._graphs = None if graphs is None else GraphedPasses(graphs, model, strategy, **how)
        self.outputs = None if reuse is None else OutputStore(reuse, stays=graphs is not None)
        self._quantized = quantized
        self.cache = self._new_cache(len(embeds_BLE), window, history)
        self._similar = similar
        self._choose_frames()

    def _new_cache(self, batch: int, window: SlidingWindow, history: int) -> KVCache:
        model, config, strategy = self._model, self._model.config, self._strategy
        return KVCache(
            config.num_layers,
            batch,
            window,
            strategy.stored_tokens,
            strategy.stored_heads,
            config.head_dim,
            dtype=model.dtype,
            device=model.device,
            quantized=self._quantized,
            history=history,
            cached=strategy.cached,
            all_heads=config.num_heads,
            rotate_on_read=self._inputs.rotate_on_read(strategy.stored_tokens),
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
        other._strategy, other._inputs = strategy, self._inputs.fork()
        other._graphs = other.outputs = other._similar = None
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
        self._inputs.forget_times()
        self.set_text(embeds_BLE)

    def fork(self) -> CausalStream:
        """Returns a stream that goes on from here by itself, between two chunks. The caches share what both keep."""
        fork = copy.copy(self)
        fork.cache, fork._inputs = self.cache.fork(), self._inputs.fork()
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
        self._broken = False
        self._inputs.forget_rotation()
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

    def _choose_frames(self) -> None:
        """Lets the cache ask which frames a chunk attends, with the heads that this rank caches."""
        if self._similar is not None:
            config, cached = self._model.config, self._strategy.heads_cached
            heads = [cached(layer, config.num_heads) for layer in range(config.num_layers)]
            self.cache.choose_frames(partial(self._similar.choose, heads=heads))

    def _forward(self, parts: list[Part], output: OutputOf = computed, pattern: Hashable = None) -> Tensor:
        if self._broken:
            raise RuntimeError("a forward of this stream was cut short, its cache is half written: cancel the chunk")
        chunks = tuple([part.chunk for part in parts])
        similar = self._similar
        observed = similar if similar is not None and similar.observes(parts) else None
        operations = self._operations(tuple([chunk.frames for chunk in chunks]))
        compute = partial(self._compute, chunks, operations, output, observed)
        inputs, window = self._inputs, self.cache.window
        tokens_BTE, time, rotation = inputs.tokens(parts), inputs.time(parts), inputs.rotation(chunks, window)
        self._broken = True
        if self._graphs is None:
            velocity = compute(tokens_BTE, time, rotation)
        else:
            kind = pattern, observed is None
            velocity = self._graphs.run(self.cache, chunks, compute, tokens_BTE, time, rotation, kind)
        if observed is not None and observed.take(parts, window):
            self.cache.restart_plans()
        self._broken = False
        last = parts[-1].tokens_BFSE
        return velocity.view(last.shape).to(last.dtype)

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
            cache = self.cache.layer(layer)
            if cache.centre is not None:
                cache.centre(self._strategy.key_mean(projection, layer, chunks[0], own))
            return self._strategy.attend(projection, cache, chunks, own).flatten(1, 2)

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

    def _operations(self, kind: tuple[int, ...]) -> PassOperations:
        """Returns operations that check their arguments for the first pass of a kind, and others for later ones."""
        if torch.is_grad_enabled():
            return PassOperations.checked(self._strategy.backend)
        if kind in self._checked_kinds:
            return self._unchecked
        self._checked_kinds.add(kind)
        return PassOperations.checked(self._strategy.backend, in_place=True)


def _copied(keys: Keys) -> Keys:
    return replace(keys, k=keys.k.clone(), v=keys.v.clone())
