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
from causalrope_sp.heads.policy import SKIP, HeadPolicy, Window
from causalrope_sp.heads.rings import HeadRings
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

    A head goes down a ladder of windows; layer 0 stays whole. Each window is tried by itself first, and then in the
    order of what error it costs for a key that is not seen any more. It is kept, and every later one is tried on top of
    it, if it lowers error + weight·(1 - sparsity), where sparsity is the share of the window's keys that heads do not
    see. The search ends when heads see `budget` of the keys.

    Args:
        loop: the stream of latents of one of the videos, for its model, ranks and sizes.
        samples: a pass of each video.
        ladder: the windows that a head may have, falling, all below that of the samples; see `ladder`.
        weight: λ.
        budget: the share of keys at which the search ends.
    """

    def __init__(
        self, loop: ChunkLoop, samples: Sequence[Sample], ladder: Sequence[int], weight: float, budget: float
    ) -> None:
        self._loop, self._samples, self._ladder = loop, samples, ladder
        self._weight, self._budget = weight, budget

    def run(self) -> Searched:
        """Runs the search; all ranks must call it."""
        config = self._loop.model.config
        windows: list[list[Window]] = [[None] * config.num_heads for _ in range(config.num_layers)]
        best, curve = self._weight, [(1.0, 0.0)]
        for layer, head, window in self._by_price(windows):
            if curve[-1][0] <= self._budget:
                break
            tried = _with(windows, layer, head, window)
            kept, error = self.kept(_policy(tried)), self.error(_policy(tried))
            if error + self._weight * kept < best:
                windows, best = tried, error + self._weight * kept
                curve.append((kept, error))
        return Searched(_policy(windows), tuple(curve))

    def _by_price(self, whole: Sequence[Sequence[Window]]) -> list[tuple[int, int, Window]]:
        """Layer, head and window of all steps down the ladder, the least error for a key that is not seen first."""
        found = []
        for layer in range(1, len(whole)):
            for head in range(len(whole[layer])):
                tried = [_policy(_with(whole, layer, head, window)) for window in self._ladder]
                points = [(1.0, 0.0), *((self.kept(policy), self.error(policy)) for policy in tried)]
                found += [(price, layer, head, rung) for price, rung in _steps(points)]
        return [(layer, head, self._ladder[rung - 1]) for _, layer, head, rung in sorted(found)]

    def kept(self, policy: HeadPolicy) -> float:
        """Returns the share of the window's keys that heads see."""
        return policy.share_of_frames(self._samples[0].stream.cache.window.frames)

    def _opened(self, sample: Sample, policy: HeadPolicy) -> CausalStream:
        """The stream of a sample with windows of heads, right before the sample's pass."""
        loop, config, options = self._loop, self._loop.model.config, self._loop.options.stream
        sizes = config.num_layers, config.num_heads, loop.layout.ulysses, sample.stream.cache.window.frames
        rings = HeadRings.of(policy, *sizes, options.sink, options.chunk_frames, frame_rows=loop.context.grid.rows)
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


def ladder(static: int, chunk_frames: int, window: int) -> list[int]:
    """Returns the windows below a stream's that a head may have, falling.

    Args:
        static: the window of a static head, in latent frames.
        chunk_frames: latent frames of a chunk.
        window: the window of the stream.

    Returns:
        That which leaves out half of the frames that a static head leaves out, a chunk more than a static head sees,
        that of a static head, and none.
    """
    half = window - (window - static) // 2
    return sorted({w for w in (half, static + chunk_frames, static, SKIP) if w < window}, reverse=True)


def _steps(points: Sequence[tuple[float, float]]) -> list[tuple[float, int]]:
    """The lower convex hull of keys and errors, from the first point on: the price of each step, which rises, and the
    number of the point that it leads to.

    Args:
        points: the share of keys, which falls, and the error.
    """
    found: list[tuple[float, int]] = []
    at = 0
    while at < len(points) - 1:
        keys, error = points[at]
        later = range(at + 1, len(points))
        price, at = min(((points[n][1] - error) / (keys - points[n][0]), n) for n in later)
        found.append((price, at))
    return found


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
