"""The exchange primitives: every collective on a stream's way is called here and nowhere else, and noted in the ledger.

Pieces from different ranks differ in size, because shards of a frame differ by at most one token: an all-to-all takes
split sizes, an all-gather takes blocks of the largest size, of which the smaller pieces fill the front.
Buffers are named by their use, allocated once and reused by every layer and pass.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from causalrope_sp.distributed.comm_stats import LAYERLESS, CommStats, Entry
from causalrope_sp.errors import RankLostError

# torch 2.13 renamed all_gather_into_tensor and warns at every call of the old name
all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

Shape = Sequence[int]


class AsyncHandle:
    """A collective in flight. The send buffer may be written, and the pieces read, after `wait`."""

    def __init__(
        self, work: dist.Work, pieces: list[Tensor], communicator: Communicator, kind: str, layer: int
    ) -> None:
        self._work, self._pieces, self._communicator = work, pieces, communicator
        self._kind, self._layer = kind, layer

    def wait(self) -> list[Tensor]:
        """What the ranks sent here, in order of rank. On CUDA the stream waits and the host does not.

        Raises:
            RankLostError: a rank is gone.
        """
        comm_stats, kind, layer = self._communicator.comm_stats, self._kind, self._layer
        if self._pieces[0].is_cuda:
            began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            began.record()
            self._finish()
            ended.record()
            comm_stats.add_wait(kind, layer, began, ended)
        else:
            started = time.perf_counter()
            self._finish()
            comm_stats.add(kind, layer, Entry(waited_s=time.perf_counter() - started))
        return self._pieces

    def _finish(self) -> None:
        try:
            self._work.wait()
        except RuntimeError as error:
            gone = self._communicator.lost_rank() or f"a collective ({self._kind}) failed: {str(error).splitlines()[0]}"
            raise RankLostError(gone) from error


class Communicator:
    """Some ranks that talk, and what they keep for it.

    Args:
        group: the process group of these ranks.
        ledger: where every collective is noted.
        lost_rank: asked when a collective fails; a line that names the rank, or None.

    `buffers` are those that were allocated so far, by use and dtype.
    """

    def __init__(self, group: dist.ProcessGroup, comm_stats: CommStats, lost_rank: Callable[[], str | None]) -> None:
        self.rank, self.size = group.rank(), group.size()
        self.comm_stats, self.lost_rank = comm_stats, lost_rank
        self._group = group
        self.buffers: dict[tuple[str, torch.dtype], Tensor] = {}

    def buffer(self, use: str, shapes: Sequence[Shape], like: Tensor, *, block: int | None = None) -> list[Tensor]:
        """Room for a piece of each shape, side by side in one stretch of memory, or each at the front of `block`."""
        sizes = [prod(shape) for shape in shapes]
        flat = self._flat(use, block * len(sizes) if block else sum(sizes), like)
        places = flat.split(block or sizes)
        return [place[:size].view(*shape) for place, size, shape in zip(places, sizes, shapes, strict=True)]

    def all_to_all(
        self, kind: str, layer: int, shapes: Sequence[Shape], sent: Sequence[Tensor], use: str = ""
    ) -> AsyncHandle:
        """Sends piece r of the buffer `sent` to rank r; `shapes` are the shapes of what the ranks send here."""
        sizes = [prod(shape) for shape in shapes]
        like = sent[0]
        received = self._flat(f"{kind}{use} in", sum(sizes), like)
        outgoing = _contiguous(sent)
        self.comm_stats.begin(kind, layer, sum(sizes) - sizes[self.rank], like)
        work = dist.all_to_all_single(
            received, outgoing, sizes, [piece.numel() for piece in sent], self._group, async_op=True
        )
        pieces = [flat.view(*shape) for flat, shape in zip(received.split(sizes), shapes, strict=True)]
        return AsyncHandle(work, pieces, self, kind, layer)

    def all_gather(self, kind: str, layer: int, shapes: Sequence[Shape], sent: Tensor) -> AsyncHandle:
        """Sends `sent`, the only piece of a buffer whose block holds the largest of `shapes`, to every rank."""
        block = max(prod(shape) for shape in shapes)
        outgoing = sent.as_strided((block,), (1,))
        received = self._flat(f"{kind} in", block * self.size, sent)
        self.comm_stats.begin(kind, layer, block * (self.size - 1), sent)
        work = all_gather_single(received, outgoing, self._group, async_op=True)
        pieces = [place[: prod(shape)].view(*shape) for place, shape in zip(received.split(block), shapes, strict=True)]
        return AsyncHandle(work, pieces, self, kind, layer)

    def gather_tokens(self, tokens_BFSE: Tensor, sizes: Sequence[int]) -> Tensor:
        """All tokens of some frames on every rank, from each rank's own; rank r has sizes[r] of a frame."""
        batch, frames, _, width = tokens_BFSE.shape
        shapes = [(batch, frames, size, width) for size in sizes]
        block = max(prod(shape) for shape in shapes)
        (sent,) = self.buffer("latents out", [tokens_BFSE.shape], tokens_BFSE, block=block)
        sent.copy_(tokens_BFSE)
        return torch.cat(self.all_gather("latents", LAYERLESS, shapes, sent).wait(), 2)

    def broadcast(self, kind: str, room: Tensor, source: int) -> Tensor:
        """Fills `room`, which is contiguous, on every rank with what it holds on the rank `source`."""
        self.comm_stats.begin(kind, LAYERLESS, room.numel() if self.rank != source else 0, room)
        sent = room.view(torch.uint8) if room.element_size() == 1 else room  # no backend knows 8-bit floats
        work = dist.broadcast(sent, group=self._group, group_src=source, async_op=True)
        assert work is not None, "asked for one in flight"
        AsyncHandle(work, [room], self, kind, LAYERLESS).wait()
        return room

    def send(self, kind: str, x: Tensor, to: int) -> None:
        """`x` to one rank, which receives it."""
        work = dist.isend(x, group=self._group, group_dst=to)
        assert work is not None, "asked for one in flight"
        AsyncHandle(work, [x], self, kind, LAYERLESS).wait()

    def receive(self, kind: str, room: Tensor, source: int) -> Tensor:
        """What one rank sends, in `room`. It is no collective that ranks could be behind in."""
        self.comm_stats.add(kind, LAYERLESS, Entry(1, room.numel(), room.nbytes))
        work = dist.irecv(room, group=self._group, group_src=source)
        assert work is not None, "asked for one in flight"
        AsyncHandle(work, [room], self, kind, LAYERLESS).wait()
        return room

    def gather_to_first(self, kind: str, shapes: Sequence[Shape], sent: Tensor) -> list[Tensor]:
        """Rank 0 gets `sent` of every rank, in order of rank and of these shapes; the others get nothing."""
        none: Shape = (0,)
        out = self.buffer(f"{kind} out", [sent.shape] + [none] * (self.size - 1), sent)
        out[0].copy_(sent)
        return self.all_to_all(kind, LAYERLESS, shapes if self.rank == 0 else [none] * self.size, out).wait()

    def everyone(self, mine: dict[str, str]) -> list[dict[str, str]]:
        """What every rank has to say, in order of rank. Before a stream begins: the ledger does not hear of it."""
        said: list[Any] = [None] * self.size
        dist.all_gather_object(said, mine, self._group)
        return said

    def _flat(self, use: str, size: int, like: Tensor) -> Tensor:
        kept = self.buffers.get((use, like.dtype))
        if kept is None or len(kept) < size:
            with torch.inference_mode(False):  # or the next stream could not write it outside inference mode
                kept = torch.empty(size, dtype=like.dtype, device=like.device)
            self.buffers[use, like.dtype] = kept
        return kept[:size]


def _contiguous(pieces: Sequence[Tensor]) -> Tensor:
    """The one stretch of memory that the pieces of a buffer fill."""
    return pieces[0].as_strided((sum(piece.numel() for piece in pieces),), (1,))
