"""Attention on the frames of the window that resemble a chunk: which frames those are, chosen once a chunk and head.

A chunk's first pass attends the whole window. From then on a head attends the sink, the newest frame before the chunk,
the chunk itself, and of the other frames those with the largest ⟨mean query, mean key⟩. The mean query is that of the
chunk in its first pass; mean keys are those of context passes, which are clean. The choice holds for all later passes
of the chunk, its context pass included. Heads with a window of their own choose nothing: they attend that window.

Means are taken before the rotation in time, which all tokens of a frame share, so that a mean is rotated in its place.
Each rank sums over its own tokens of all heads, whatever the attention strategy is, and one all-gather a chunk adds the
sums up. All ranks then make the same choice from the same numbers.

Shapes: L layers, B batch, F frames, s tokens of a frame on this rank, H heads, d head width, G heads of all layers that
choose, N frames to choose from, C frames of the chunk, E channel pairs that rotate by time.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from causalrope_kernels import PassOperations, Projection, Slots
from causalrope_kernels.tables import on_device
from causalrope_sp.cache.read_plans import Chosen
from causalrope_sp.cache.window import SlidingWindow
from causalrope_sp.config import NEWEST, DiTConfig, StreamConfig
from causalrope_sp.distributed.comm_stats import LAYERLESS
from causalrope_sp.distributed.communicator import Communicator
from causalrope_sp.grid import Chunk
from causalrope_sp.models.rope import frequencies
from causalrope_sp.sampling.pass_inputs import Part
from causalrope_sp.sampling.similarity_schedule import top_frames

Choice = Sequence[Mapping[int, Collection[int]]]  # the frames that a chunk attends, by layer and number of the head


class SimilarFrames:
    """Chooses the frames that the chunks of a stream attend.

    Args:
        top: returns how many frames a chunk attends beyond the sink, the newest frame and itself.
        config: the sizes of the model.
        sink: how many of a shot's first frames every chunk attends. A window of the whole video has no sink of its own.
        relative: whether a frame's time is its position within the window.
        heads: by layer, the numbers of the heads that choose.
        kept: of how many frames the means are kept: those of the window and of the chunks that can be taken back.
        communicator: the ranks that share the tokens; None for one rank.
    """

    def __init__(
        self,
        top: Callable[[Chunk], int],
        config: DiTConfig,
        *,
        sink: int,
        relative: bool,
        heads: Sequence[Sequence[int]],
        kept: int,
        communicator: Communicator | None,
    ) -> None:
        self._top, self._config, self._sink, self._relative = top, config, sink, relative
        self._heads, self._kept, self._communicator = heads, kept, communicator
        places = [(layer, head) for layer, own in enumerate(heads) for head in own]
        self._places = tuple(zip(*places, strict=True))  # all layers, then all numbers
        spatial = config.head_dim // 6
        self._frequencies = frequencies(config.head_dim // 2 - 2 * spatial, config.theta)
        self._sums: dict[torch.Size, Tensor] = {}  # by the shape of a pass: a captured graph has their addresses
        self._pending: list[tuple[Chunk, Tensor]] = []  # this rank's sums since the last choice
        self._keys: dict[int, Tensor] = {}  # by frame: the sum of its clean keys on all ranks, (G, B, d)
        self._choices: dict[Chunk, Choice | None] = {}

    def fork(self) -> SimilarFrames:
        """Returns what chooses for a stream that goes on from here by itself."""
        fork = copy.copy(self)
        fork._sums, fork._pending, fork._keys = {}, list(self._pending), dict(self._keys)
        fork._choices = dict(self._choices)
        return fork

    def clear(self) -> None:
        """Forgets all frames: until others are computed, every frame is attended."""
        for known in (self._pending, self._keys, self._choices):
            known.clear()

    def begin(self, chunk: Chunk) -> None:
        """Forgets the choices for a chunk that is made anew, and for later ones."""
        self._choices = {of: choice for of, choice in self._choices.items() if of.start < chunk.start}

    def observes(self, parts: Sequence[Part]) -> bool:
        """Returns whether a pass over these parts is to be observed: context passes are, and a chunk's first pass."""
        return not parts[0].timestep or parts[-1].chunk not in self._choices

    def observe(self, layer: int, projection: Projection, operations: PassOperations) -> None:
        """Sums a layer's queries and keys over this rank's tokens of each frame of a pass, if a head of it chooses."""
        if not self._heads[layer]:
            return
        rotation = projection.rotation
        at_zero = torch.zeros_like(rotation.query_times_F)
        source = replace(projection, rotation=replace(rotation, query_times_F=at_zero, key_times_F=at_zero))
        q, k = projection.like.new_empty(2, *projection.shape)
        operations.norm_rope_store(source, q=[Slots(q)], k=[Slots(k)])
        sums = self._of_shape(projection)
        for into, x in zip(sums[layer], (q, k), strict=True):
            torch.sum(x, 2, dtype=sums.dtype, out=into)

    def _of_shape(self, projection: Projection) -> Tensor:
        """The sums of a pass of this shape, (L, 2, B, F, H, d)."""
        batch, frames, _, heads, width = projection.shape
        shape = torch.Size((self._config.num_layers, 2, batch, frames, heads, width))
        sums = self._sums.get(shape)
        if sums is None:
            like = projection.like
            dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
            with torch.inference_mode(False):  # or a later pass could not write it outside inference mode
                sums = self._sums[shape] = torch.zeros(shape, dtype=dtype, device=like.device)
        return sums

    def take(self, parts: Sequence[Part], window: SlidingWindow) -> bool:
        """Keeps what an observed pass has summed up. After a chunk's first pass it chooses the frames that the chunk's
        later passes attend. Every rank must call it.

        Args:
            parts: the parts of the pass.
            window: the window of the stream.

        Returns:
            Whether frames were chosen for the last part's chunk.
        """
        sums_L2BFHD = self._of_pass(len(parts[0].tokens_BFSE), sum(part.chunk.frames for part in parts))
        clean, last = parts[0], parts[-1]
        if not clean.timestep:
            self._pending.append((clean.chunk, self._of_choosing(sums_L2BFHD[:, 1, :, : clean.chunk.frames])))
        if not last.timestep or last.chunk in self._choices:
            return False
        self._decide(last.chunk, window, self._of_choosing(sums_L2BFHD[:, 0, :, -last.chunk.frames :]))
        return True

    def _of_choosing(self, sums_LBFHD: Tensor) -> Tensor:
        """A copy of the sums of the heads that choose, (G, B, F, d)."""
        layers, heads = on_device(self._places, sums_LBFHD.device)
        return sums_LBFHD.movedim(3, 1)[layers, heads]

    def _decide(self, chunk: Chunk, window: SlidingWindow, q_GBFD: Tensor) -> None:
        """Chooses the frames that a chunk attends, by the sums of this rank's queries of it."""
        *clean, queries_GBFD = self._of_all_ranks([*(sums for _, sums in self._pending), q_GBFD])
        for (of, _), keys_GBFD in zip(self._pending, clean, strict=True):
            self._keys |= dict(zip(range(of.start, of.stop), keys_GBFD.unbind(2), strict=True))
        self._pending.clear()
        self._choices[chunk] = self._choice(chunk, window, queries_GBFD)
        oldest = chunk.start - self._kept
        self._keys = {frame: keys for frame, keys in self._keys.items() if frame >= oldest}
        self._choices = {of: choice for of, choice in self._choices.items() if of.start >= oldest}

    def _of_pass(self, batch: int, frames: int) -> Tensor:
        config = self._config
        return self._sums[torch.Size((config.num_layers, 2, batch, frames, config.num_heads, config.head_dim))]

    def _of_all_ranks(self, sums: Sequence[Tensor]) -> list[Tensor]:
        """The sums of all ranks, in float64 on the host, which waits for them."""
        flat = torch.cat([x.flatten() for x in sums])
        total = flat.double()
        if self._communicator is not None:
            (sent,) = self._communicator.buffer("means out", [flat.shape], flat)
            sent.copy_(flat)
            shapes = [flat.shape] * self._communicator.size
            received = self._communicator.all_gather("means", LAYERLESS, shapes, sent).wait()
            total = torch.stack([piece.double() for piece in received]).sum(0)
        parts = total.cpu().split([x.numel() for x in sums])
        return [part.view(x.shape) for part, x in zip(parts, sums, strict=True)]

    def choose(self, chunk: Chunk, heads: Sequence[Sequence[int]]) -> Chosen | None:
        """Returns the frames that those of some heads which choose attend, in the order of `heads`.

        Args:
            chunk: the chunk of the queries.
            heads: numbers of heads, by layer.

        Returns:
            The frames by layer and head, or None for all that the window holds.
        """
        choice = self._choices.get(chunk)
        if choice is None:
            return None
        return [[of[head] for head in own if head in of] for of, own in zip(choice, heads, strict=True)]

    def _choice(self, chunk: Chunk, window: SlidingWindow, q_GBFD: Tensor) -> Choice | None:
        held, top = sorted(window.held(chunk.stop).values()), self._top(chunk)
        shot = window.sink_at(chunk.stop).start
        sink = range(shot, shot + self._sink)
        free = [f for f in held if f < chunk.start - NEWEST and f not in sink and f in self._keys]
        if len(free) <= top:
            return None
        fixed = frozenset(held).difference(free)
        time = {frame: number for number, frame in enumerate(held)} if self._relative else {f: f for f in held}
        apart_NC = torch.tensor([[time[t] - time[f] for t in range(chunk.start, chunk.stop)] for f in free])
        scores_GN = self._scores(q_GBFD, torch.stack([self._keys[f] for f in free], 2), apart_NC.double())
        best = iter(scores_GN.topk(top, 1).indices.tolist())
        return [{head: fixed.union(free[n] for n in next(best)) for head in own} for own in self._heads]

    def _scores(self, q_GBFD: Tensor, k_GBND: Tensor, apart_NC: Tensor) -> Tensor:
        """⟨sum of the queries of the chunk, sum of the keys of the frame⟩, summed over the batch, (G, N)."""
        width = 2 * len(self._frequencies)
        plain_GN = torch.einsum("gbcd,gbnd->gn", q_GBFD[..., width:], k_GBND[..., width:])
        q, k = (torch.view_as_complex(x[..., :width].unflatten(-1, (-1, 2)).contiguous()) for x in (q_GBFD, k_GBND))
        angles_NCE = apart_NC.unsqueeze(-1) * self._frequencies
        turned = torch.polar(torch.ones_like(angles_NCE), angles_NCE)
        return plain_GN + torch.einsum("gbce,gbne,nce->gn", q, k.conj(), turned).real


def stream_similarity(
    config: DiTConfig,
    stream: StreamConfig,
    window: SlidingWindow,
    chunks: Iterable[Chunk],
    history: int,
    communicator: Communicator | None,
) -> SimilarFrames | None:
    """Returns what chooses the frames of the window that the chunks of a stream attend; None if there is no choice.

    Args:
        config: the sizes of the model.
        stream: the options of the stream.
        window: its window.
        chunks: all chunks of the video, or those of a stream without end until the window is full.
        history: how many chunks can be taken back.
        communicator: the ranks that share the tokens; None for one rank.
    """
    if stream.similar_frames is None or stream.similar_frames >= window.frames:
        return None
    every = (tuple(range(config.num_heads)),) * config.num_layers
    heads = every if stream.heads is None else stream.heads.whole(window.frames)
    if not any(heads):
        return None
    chunks = list(chunks)
    return SimilarFrames(
        top_frames(stream.similar_frames, stream.sink, window, chunks),
        config,
        sink=stream.sink,
        relative=stream.rope == "relative",
        heads=heads,
        kept=window.frames + (history + 3) * max(chunk.frames for chunk in chunks),
        communicator=communicator,
    )
