"""Passes of a stream by captured graphs: what a graph depends on, and what differs between passes that it serves."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from causalrope_kernels import Rotation
from causalrope_kernels.backend import use_triton
from causalrope_sp.attention.base import Strategy
from causalrope_sp.cache.kv_cache import KVCache
from causalrope_sp.grid import Chunk
from causalrope_sp.models.causal_dit import CausalDiT
from causalrope_sp.sampling.pass_graphs import PassGraphs
from causalrope_sp.sampling.pass_inputs import Time

Compute = Callable[[Tensor, Time, Rotation], Tensor]  # a pass, from its tokens, timesteps and rotation


class GraphedPasses:
    """Runs a stream's passes by captured graphs.

    Args:
        graphs: the graphs.
        model: the DiT.
        strategy: how attention crosses ranks.
        relative: whether keys are rotated on read.
        quantized: whether they are stored in 8 bits.
    """

    def __init__(
        self, graphs: PassGraphs, model: CausalDiT, strategy: Strategy, *, relative: bool, quantized: bool
    ) -> None:
        self._graphs, self._model, self._strategy = graphs, model, strategy
        # Triton reads on the device which keys are attended, so one graph serves a window that fills or rotates; `auto`
        auto = strategy.backend == "auto" and use_triton("auto", model.patch_embedding.weight.detach())
        # takes it where keys are rotated on read, and for chunks whose heads attend different frames; but in float32
        # the kernel rotates no queries, and torch attends the rotated keys of 8 bits by rows that it reads on the host
        by_kernel = not (relative and quantized and model.dtype == torch.float32)
        self._rows_on_device = by_kernel and (strategy.backend == "triton" or (auto and relative))
        self._choice_on_device = by_kernel and (strategy.backend == "triton" or auto)
        self._options = {"relative": relative, "quantized": quantized}

    def fork(self) -> GraphedPasses:
        """Returns what runs the passes of another stream: a graph has the addresses of one cache."""
        return GraphedPasses(self._graphs.fork(), self._model, self._strategy, **self._options)

    def run(
        self,
        cache: KVCache,
        chunks: tuple[Chunk, ...],
        compute: Compute,
        tokens_BTE: Tensor,
        time: Time,
        rotation: Rotation,
        pattern: Hashable,
    ) -> Tensor:
        """Runs a pass, by a graph if its kind has one.

        Args:
            cache: the KV cache of the stream.
            chunks: the chunks of the pass; the last one is open.
            compute: runs the pass on inputs such as the following three.
            tokens_BTE: its tokens.
            time: its timesteps, with their modulation.
            rotation: the rotation of its tokens.
            pattern: which outputs it reuses and keeps, and whether similar frames are chosen by it.

        Returns:
            The output of the pass.
        """
        if not cache.offsets.are_set:  # which this pass does, on the host
            return compute(tokens_BTE, time, rotation)
        since, chosen = self._strategy.splits_at(chunks), [cache.are_chosen(chunk) for chunk in chunks]
        if (obstacle := self._never_captured(cache, chunks, any(chosen))) is not None:
            self._graphs.refuse(obstacle)
            return compute(tokens_BTE, time, rotation)
        times = rotation.query_times_F, rotation.key_times_F
        timesteps_F, modulation = time
        vectors = modulation.blocks_L6FD, modulation.head_2FD
        inputs = [tokens_BTE, *vectors, *times, *cache.begin_graph(chunks, since)]

        def forward(inputs: Sequence[Tensor]) -> Tensor:
            tokens, blocks, head, query_times, key_times, *slots = inputs
            key_times = query_times if times[0] is times[1] else key_times
            with cache.reading(chunks, since, slots):
                own_rotation = replace(rotation, query_times_F=query_times, key_times_F=key_times)
                own_modulation = replace(modulation, blocks_L6FD=blocks, head_2FD=head)
                return compute(tokens, (timesteps_F, own_modulation), own_rotation)

        attended = tuple(cache.attended_rows(chunk, since, counted=self._rows_on_device) for chunk in chunks)
        frames = tuple(chunk.frames for chunk in chunks)
        # the table of times is replaced by a longer one when the stream outgrows it
        shapes = tokens_BTE.shape, vectors[0].shape  # timesteps differ within a chunk where frames of it are given
        kind = cache, cache.storages, attended, frames, shapes, len(rotation.time), pattern
        # a hook sees passes, which a graph hides
        hooked = "the model has hooks" if self._model._forward_pre_hooks or self._model._forward_hooks else None
        return self._graphs.run(kind, chunks[-1].index, inputs, forward, cache.restore_evicted, hooked)

    def _never_captured(self, cache: KVCache, chunks: Sequence[Chunk], chosen: bool) -> str | None:
        """Returns why passes like this one are never captured, or None."""
        if cache.evicts(chunks[0]):  # its clean keys and values are saved layer by layer as they are written
            return "a chunk overwrites the frames of the chunk before it, whose context pass it shares"
        if chosen and not self._choice_on_device:
            return "this attention backend reads on the host which frames are similar"
        return None
