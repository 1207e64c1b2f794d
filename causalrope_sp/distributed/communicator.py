"""The collectives of a group of ranks. Every collective of a stream is started here and counted in `CommStats`.

Pieces of different ranks differ in size, since shards of a frame differ by at most one token. An all-to-all takes split
sizes; an all-gather takes blocks of the largest size, and a smaller piece fills the front of its block. Buffers are
named by their use, allocated once and reused by every layer and pass.

Shapes: B batch, F frames, S tokens of a frame on this rank, E numbers in a token.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from causalrope_sp.devices import recorded_event
from causalrope_sp.distributed.comm_stats import LAYERLESS, CommStats, Entry
from causalrope_sp.errors import RankLostError, first_line

# torch 2.13 renamed all_gather_into_tensor and warns at every call of the old name
all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

Shape = Sequence[int]


class AsyncHandle:
    """A collective that was started. After `wait` the send buffer may be written and the pieces may be read."""

    def __init__(
        self, work: dist.Work, pieces: list[Tensor], communicator: Communicator, kind: str, layer: int
    ) -> None:
        self._work, self._pieces, self._communicator = work, pieces, communicator
        self._kind, self._layer = kind, layer

    def wait(self) -> list[Tensor]:
        """Waits for the collective. On CUDA the stream waits and the host does not.

        Returns:
            The pieces that this rank received, in order of rank.

        Raises:
            RankLostError: the collective failed; the message names the lost rank if the watchdog knows it.
        """
        comm_stats, kind, layer = self._communicator.comm_stats, self._kind, self._layer
        if comm_stats.captured is not None:
            self._work.wait()
        elif self._pieces[0].is_cuda:
            began = recorded_event(self._pieces[0].device, timing=True)
            self._finish()
            ended = recorded_event(self._pieces[0].device, timing=True)
            comm_stats.add_wait(kind, layer, began, ended)
        else:
            started = time.perf_counter()
            self._finish()
            comm_stats.add(kind, layer, Entry(waited_s=time.perf_counter() - started))
        return self._pieces

    def _finish(self) -> None:
        """Waits, and raises RankLostError for a collective that failed."""
        try:
            self._work.wait()
        except RuntimeError as error:
            raise self._communicator.lost(self._kind, error) from error


class Communicator:
    """The collectives of some ranks, and their buffers.

    Args:
        group: the process group of these ranks.
        comm_stats: counts every collective.
        lost_rank: called when a collective fails; returns a line that names the lost rank, or None.
    """

    def __init__(self, group: dist.ProcessGroup, comm_stats: CommStats, lost_rank: Callable[[], str | None]) -> None:
        self.rank, self.size = group.rank(), group.size()
        self.comm_stats, self._lost_rank = comm_stats, lost_rank
        self._group = group
        self.buffers: dict[tuple[str, torch.dtype], Tensor] = {}

    def buffer(self, use: str, shapes: Sequence[Shape], like: Tensor, *, block: int | None = None) -> list[Tensor]:
        """Returns the pieces of a send buffer. The buffer is reused by the next call with the same use and dtype.

        Args:
            use: the name of the buffer.
            shapes: the shapes of the pieces.
            like: a tensor of the same dtype and device.
            block: how many numbers lie between the starts of two pieces; None if pieces follow each other without gaps.
        """
        sizes = [prod(shape) for shape in shapes]
        flat = self._flat(use, block * len(sizes) if block else sum(sizes), like)
        blocks = flat.split(block or sizes)
        return [memory[:size].view(*shape) for memory, size, shape in zip(blocks, sizes, shapes, strict=True)]

    def all_to_all(
        self, kind: str, layer: int, shapes: Sequence[Shape], sent: Sequence[Tensor], use: str = ""
    ) -> AsyncHandle:
        """Starts to send one piece to each rank.

        Args:
            kind: the kind of the collective, for `CommStats`.
            layer: the layer that it belongs to, or `LAYERLESS`.
            shapes: the shapes of the pieces that this rank receives, in order of rank.
            sent: the pieces of one `buffer` without gaps, in order of rank.
            use: a suffix of the receive buffer's name, to keep results of the same kind at once.
        """
        sizes = [prod(shape) for shape in shapes]
        like = sent[0]
        received = self._flat(f"{kind}{use} in", sum(sizes), like)
        outgoing = _contiguous(sent)
        self.comm_stats.begin(kind, layer, sum(sizes) - sizes[self.rank], like)
        split = [piece.numel() for piece in sent]
        work = self._start(kind, dist.all_to_all_single, received, outgoing, sizes, split, self._group, async_op=True)
        pieces = [flat.view(*shape) for flat, shape in zip(received.split(sizes), shapes, strict=True)]
        return AsyncHandle(work, pieces, self, kind, layer)

    def all_gather(self, kind: str, layer: int, shapes: Sequence[Shape], sent: Tensor) -> AsyncHandle:
        """Starts to send one piece to every rank.

        Args:
            kind: the kind of the collective, for `CommStats`.
            layer: the layer that it belongs to, or `LAYERLESS`.
            shapes: the shapes of the pieces that the ranks send, in order of rank.
            sent: this rank's piece, the only one of a `buffer` whose block holds the largest of `shapes`.
        """
        block = max(prod(shape) for shape in shapes)
        outgoing = sent.as_strided((block,), (1,))
        received = self._flat(f"{kind} in", block * self.size, sent)
        self.comm_stats.begin(kind, layer, block * (self.size - 1), sent)
        work = self._start(kind, all_gather_single, received, outgoing, self._group, async_op=True)
        pieces = [flat[: prod(shape)].view(*shape) for flat, shape in zip(received.split(block), shapes, strict=True)]
        return AsyncHandle(work, pieces, self, kind, layer)

    def gather_tokens(self, tokens_BFSE: Tensor, sizes: Sequence[int]) -> Tensor:
        """Gathers all tokens of some frames on every rank.

        Args:
            tokens_BFSE: this rank's tokens.
            sizes: the tokens of a frame that each rank owns, in order of rank.

        Returns:
            The tokens of all ranks, (B, F, sum of `sizes`, E).

        Raises:
            RankLostError: the collective failed.
        """
        batch, frames, _, width = tokens_BFSE.shape
        shapes = [(batch, frames, size, width) for size in sizes]
        block = max(prod(shape) for shape in shapes)
        (sent,) = self.buffer("latents out", [tokens_BFSE.shape], tokens_BFSE, block=block)
        sent.copy_(tokens_BFSE)
        return torch.cat(self.all_gather("latents", LAYERLESS, shapes, sent).wait(), 2)

    def broadcast(self, kind: str, tensor: Tensor, source: int) -> Tensor:
        """Broadcasts a tensor and waits for it.

        Args:
            kind: the kind of the collective, for `CommStats`.
            tensor: a contiguous tensor, read on the rank `source` and written on the others.
            source: the number of the rank among these ranks.

        Returns:
            `tensor`.

        Raises:
            RankLostError: the collective failed.
        """
        self.comm_stats.begin(kind, LAYERLESS, tensor.numel() if self.rank != source else 0, tensor)
        sent = tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor  # no backend knows 8-bit floats
        work = self._start(kind, dist.broadcast, sent, group=self._group, group_src=source, async_op=True)
        AsyncHandle(work, [tensor], self, kind, LAYERLESS).wait()
        return tensor

    def send(self, kind: str, x: Tensor, to: int) -> None:
        """Sends `x` to the rank `to`, which calls `receive`, and waits until it is sent.

        Raises:
            RankLostError: the transfer failed.
        """
        work = self._start(kind, dist.isend, x, group=self._group, group_dst=to)
        AsyncHandle(work, [x], self, kind, LAYERLESS).wait()

    def receive(self, kind: str, out: Tensor, source: int) -> Tensor:
        """Receives what the rank `source` sends into `out`, and returns `out`.

        It does not advance `CommStats.begun`, by which the watchdog compares ranks, since it is no collective.

        Raises:
            RankLostError: the transfer failed.
        """
        self.comm_stats.add(kind, LAYERLESS, Entry(1, out.numel(), out.nbytes))
        work = self._start(kind, dist.irecv, out, group=self._group, group_src=source)
        AsyncHandle(work, [out], self, kind, LAYERLESS).wait()
        return out

    def gather_to_first(self, kind: str, shapes: Sequence[Shape], sent: Tensor) -> list[Tensor]:
        """Gathers one piece of every rank on rank 0.

        Args:
            kind: the kind of the collective, for `CommStats`.
            shapes: the shapes of the pieces, in order of rank.
            sent: this rank's piece.

        Returns:
            On rank 0 the pieces, in order of rank; on the others empty tensors.

        Raises:
            RankLostError: the collective failed.
        """
        none: Shape = (0,)
        out = self.buffer(f"{kind} out", [sent.shape] + [none] * (self.size - 1), sent)
        out[0].copy_(sent)
        return self.all_to_all(kind, LAYERLESS, shapes if self.rank == 0 else [none] * self.size, out).wait()

    def forget_buffers(self, kind: str) -> None:
        """Frees the buffers of a kind of collective that is seldom made."""
        for use in [use for use in self.buffers if use[0] in (f"{kind} out", f"{kind} in")]:
            del self.buffers[use]

    def everyone(self, fields: dict[str, str]) -> list[dict[str, str]]:
        """Gathers `fields` of every rank, in order of rank. `CommStats` has no entry of it, as no stream runs yet.

        Raises:
            RankLostError: the collective failed.
        """
        gathered: list[Any] = [None] * self.size
        self.comm_stats.reach("everyone")
        try:
            dist.all_gather_object(gathered, fields, self._group)
        except RuntimeError as error:
            raise self.lost("everyone", error) from error
        return gathered

    def lost(self, kind: str, error: RuntimeError) -> RankLostError:
        """Returns the error to raise for a collective that failed; it names the lost rank if the watchdog knows it."""
        return RankLostError(self._lost_rank() or f"a collective ({kind}) failed: {first_line(error)}")

    def _start(self, kind: str, collective: Callable[..., dist.Work | None], *args: Any, **options: Any) -> dist.Work:
        """Starts a collective."""
        try:
            work = collective(*args, **options)
        except RuntimeError as error:
            if self.comm_stats.captured is not None:  # nothing is sent while a graph is captured, so no rank is lost
                raise
            raise self.lost(kind, error) from error
        assert work is not None, "an asynchronous call returns a handle"
        return work

    def _flat(self, use: str, size: int, like: Tensor) -> Tensor:
        """The first `size` numbers of a buffer, which grows if it is smaller."""
        buffer = self.buffers.get((use, like.dtype))
        if buffer is None or len(buffer) < size:
            with torch.inference_mode(False):  # or the next stream could not write it outside inference mode
                buffer = torch.empty(size, dtype=like.dtype, device=like.device)
            self.buffers[use, like.dtype] = buffer
        if (captured := self.comm_stats.captured) is not None:  # another stream may replace the buffer by a larger one
            captured.buffers.append(buffer)
        return buffer[:size]


def _contiguous(pieces: Sequence[Tensor]) -> Tensor:
    """The contiguous memory that the pieces of a buffer fill."""
    return pieces[0].as_strided((sum(piece.numel() for piece in pieces),), (1,))
