"""What a video's lanes tell one another in a step: the read, and the frames that neighbours share.

Shapes: B batch, F latent frames, s tokens of a frame on this rank, E numbers in a token, G global tokens, H heads,
d head width of the VIN.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from causalrope_kernels import Partial, merge
from causalrope_sp.attention.base import lse_elements
from causalrope_sp.distributed import SequenceParallel
from causalrope_sp.distributed.comm_stats import LAYERLESS
from causalrope_sp.grid import LatentGrid
from causalrope_sp.vin.chunks import AssignedChunks


class ChunkExchange:
    """One rank's way to the others of a video. Every rank must build one, since groups are made here."""

    def __init__(self, parallel: SequenceParallel, assigned: AssignedChunks, grid: LatentGrid) -> None:
        self._assigned, self._sequence = assigned, parallel.mesh.sp
        self._tokens = [shard.tokens for shard in parallel.shard(grid).all]
        self._everyone = parallel.communicator_among(parallel.mesh.denoising)
        self._neighbours = parallel.communicator_among(parallel.mesh.chunk_group(parallel.rank))

    def merge_read(self, parts: Sequence[Partial]) -> Tensor:
        """The read over the keyframes of all ranks, (B, G, H, d), from the parts over this rank's own.

        A rank receives (ranks - 1)·B·G·H·(d + l) elements, l those of a log-sum-exp, however long the video is.
        """
        output, lse = merge(parts)
        if self._everyone is None:
            return output
        width, wide = output.shape[-1], lse_elements(output.element_size())
        size = (output.numel() // width * (width + wide),)

        def opened(piece: Tensor) -> Partial:
            both = piece.split([output.numel(), size[0] - output.numel()])
            return both[0].view(output.shape), both[1].view(lse.dtype).view(lse.shape)

        (sent,) = self._everyone.buffer("read out", [size], output)
        for room, found in zip(opened(sent), (output, lse), strict=True):
            room.copy_(found)
        arrived = self._everyone.all_gather("read", LAYERLESS, [size] * self._everyone.size, sent).wait()
        return merge([opened(piece) for piece in arrived])[0]

    def swap(self, velocities: Sequence[Tensor], held_BFSE: Tensor, fused: bool) -> tuple[Tensor | None, Tensor | None]:
        """What the chunks before and after this assigned's say of the frames shared with them, each (B, overlap, s, E).

        The chunk before always has its say, the one after only while they are fused: nothing but the overlap travels,
        and between neighbours alone.
        """
        assigned, communicator, overlap = self._assigned, self._neighbours, self._assigned.config.overlap
        if communicator is None:
            return None, None
        batch, _, tokens, width = held_BFSE.shape
        shared = batch, overlap, tokens, width
        before, after = assigned.rank - 1, assigned.rank + 1
        leaving: dict[int, Tensor] = {}
        arriving: list[int] = []
        if assigned.has_before:
            arriving.append(before)
            if fused:
                leaving[before] = velocities[0][:, :overlap]
        if assigned.has_after:
            leaving[after] = velocities[-1][:, -overlap:]
            if fused:
                arriving.append(after)
        sent = communicator.buffer(
            "overlap out", [shared if n in leaving else (0,) for n in range(assigned.ranks)], held_BFSE
        )
        for number, piece in leaving.items():
            sent[number].copy_(piece)
        shapes = [shared if n in arriving else (0,) for n in range(assigned.ranks)]
        pieces = communicator.all_to_all("overlap", LAYERLESS, shapes, sent).wait()
        return pieces[before] if before in arriving else None, pieces[after] if after in arriving else None

    def gather(self, held_BFSE: Tensor) -> Tensor:
        """The whole video's tokens on every rank, (B, F, S, E), from what each rank holds."""
        assigned = self._assigned
        owned = held_BFSE[:, assigned.places(assigned.owned)]
        if self._everyone is None:
            return owned
        batch, _, _, width = held_BFSE.shape
        frames = [len(assigned.of(n).owned) for n in range(assigned.ranks)]
        shapes = [(batch, count, tokens, width) for count in frames for tokens in self._tokens]
        (sent,) = self._everyone.buffer("video out", [owned.shape], owned, block=max(map(prod, shapes)))
        sent.copy_(owned)
        arrived = self._everyone.all_gather("latents", LAYERLESS, shapes, sent).wait()
        each = self._sequence
        return torch.cat([torch.cat(arrived[n * each : (n + 1) * each], 2) for n in range(assigned.ranks)], 1)
