"""Searches for windows of heads with the error of the model's velocity.

Sparse-vDiT (arXiv 2506.03065) searches so too, with the error of each head's own output.

Shapes: B batch, F latent frames, S tokens of a frame, E numbers in a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from causalrope_sp.attention.build import build_strategy
from causalrope_sp.grid import Chunk
from causalrope_sp.heads.placement import HeadRings
from causalrope_sp.heads.policy import SKIP, HeadPolicy, Window
from causalrope_sp.profiling.sums import sum_of_ranks
from causalrope_sp.sampling.chunk_loop import ChunkLoop
from causalrope_sp.sampling.stream import CausalStream


@dataclass(frozen=True)
class Sample:
    """A denoise pass that was run with all frames.

    Args:
        stream: the stream, which still holds what the pass attended.
        chunk: its chunk.
        timestep: its noise level.
        tokens_BFSE: the noisy tokens.
        velocity_BFSE: what the model predicted.
    """

    stream: CausalStream
    chunk: Chunk
    timestep: float
    tokens_BFSE: Tensor
    velocity_BFSE: Tensor


@dataclass(frozen=True)
class Searched:
    """What the search found.

    Args:
        policy: the policy.
        curve: after each head that was taken, the share of the window's keys that heads see, and the relative squared
            error of the velocity.
    """

    policy: HeadPolicy
    curve: tuple[tuple[float, float], ...]


class HeadSearch:
    """Searches for windows of heads, greedily, with the error of the model's velocity.

    A head may be static, or attend nothing; layer 0 stays whole. Each candidate is tried by itself first, and then in
    the order of what error it costs for a key that is not seen. It is kept, and every later one is tried on top of it,
    if it lowers error + weight·(1 - sparsity), where sparsity is the share of the window's keys that heads do not see.
    The search ends when heads see `budget` of the keys.

    Args:
        loop: the stream of latents of one of the videos, for its model, ranks and sizes.
        samples: a pass of each video.
        static: the window of a static head, in latent frames.
        weight: λ.
        budget: the share of keys at which the search ends.
    """

    def __init__(self, loop: ChunkLoop, samples: Sequence[Sample], static: int, weight: float, budget: float) -> None:
        self._loop, self._samples, self._static = loop, samples, static
        self._weight, self._budget = weight, budget

    def run(self) -> Searched:
        """Runs the search; all ranks must call it."""
        config = self._loop.model.config
        windows: list[list[Window]] = [[None] * config.num_heads for _ in range(config.num_layers)]
        best, curve = self._weight, [(1.0, 0.0)]
        for layer, head, window in self._by_price(windows):
            if curve[-1][0] <= self._budget:
                break
            if windows[layer][head] == SKIP:
                continue
            tried = _with(windows, layer, head, window)
            kept, error = self.kept(_policy(tried)), self.error(_policy(tried))
            if error + self._weight * kept < best:
                windows, best = tried, error + self._weight * kept
                curve.append((kept, error))
        return Searched(_policy(windows), tuple(curve))

    def _by_price(self, whole: Sequence[Sequence[Window]]) -> list[tuple[int, int, Window]]:
        """Layer, head and window of all candidates, the least error for a key that is not seen first."""
        found = []
        for layer in range(1, len(whole)):
            for head in range(len(whole[layer])):
                for window in (self._static, SKIP):
                    policy = _policy(_with(whole, layer, head, window))
                    found.append((self.error(policy) / (1 - self.kept(policy)), layer, head, window))
        return [(layer, head, window) for _, layer, head, window in sorted(found)]

    def kept(self, policy: HeadPolicy) -> float:
        """Returns the share of the window's keys that heads see."""
        return policy.share_seen(self._samples[0].stream.cache.window.frames)

    def _opened(self, sample: Sample, policy: HeadPolicy) -> CausalStream:
        """The stream of a sample with windows of heads, right before the sample's pass."""
        loop, config, options = self._loop, self._loop.model.config, self._loop.options.stream
        sizes = config.num_layers, config.num_heads, loop.layout.ulysses, sample.stream.cache.window.frames
        rings = HeadRings.of(policy, *sizes, options.sink, options.chunk_frames)
        stream = sample.stream.with_strategy(build_strategy(loop.parallel, loop.layout, loop.context.grid, rings))
        fill(stream, sample)
        return stream

    @torch.inference_mode()
    def error(self, policy: HeadPolicy) -> float:
        """Returns the relative squared error of the velocity under a policy, over all samples and ranks."""
        sums = torch.zeros(2, dtype=torch.float64)
        for sample in self._samples:
            stream = self._opened(sample, policy)
            velocity = stream.denoise(sample.chunk, sample.tokens_BFSE, sample.timestep).double()
            exact = sample.velocity_BFSE.double()
            sums += torch.stack([(velocity - exact).square().sum(), exact.square().sum()]).cpu()
        error, exact = sum_of_ranks(sums, self._loop.parallel)
        return float(error / exact)


def fill(stream: CausalStream, sample: Sample) -> None:
    """Gives a stream with windows of heads the committed frames that the stream of a sample holds."""
    source, start = sample.stream.cache, sample.chunk.start
    stream.restart(source.window, start)
    (ring,) = source.rings
    slots = {frame: slot for slot, frame in ring.window.held(sample.chunk.stop).items() if frame < start}
    frames = list(slots)
    for layer, whole in enumerate(ring.storage):
        placements, first = stream.strategy.placements, 0
        order = placements[layer].order if placements else range(ring.heads(layer))
        for own in stream.cache.rings:
            heads = list(order[first : first + own.heads(layer)])
            places = own.places(frames, sample.chunk.stop)
            held = whole.read([slots[frames[number]] for number, _ in places])
            own.storage[layer].write([slot for _, slot in places], held[..., heads, :])
            first += len(heads)
        if (offsets_LBND := source.offsets.read()) is not None:  # of a quantized cache
            stream.cache.offsets.set(layer, offsets_LBND[layer])


def _with(windows: Sequence[Sequence[Window]], layer: int, head: int, window: Window) -> list[list[Window]]:
    """Windows of which one is replaced."""
    found = [list(of) for of in windows]
    found[layer][head] = window
    return found


def _policy(windows: Sequence[Sequence[Window]]) -> HeadPolicy:
    return HeadPolicy(tuple(map(tuple, windows)))
