"""The collectives of a step of parallel chunks: merging the read, and swapping the velocities of shared frames.

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
    """The communicators between the ranks that denoise a video. Every rank must build one: it creates process groups.

    Args:
        parallel: the ranks and their mesh.
        assigned: the chunks that this rank denoises.
        grid: the latent frame in tokens.
    """

    def __init__(self, parallel: SequenceParallel, assigned: AssignedChunks, grid: LatentGrid) -> None:
        self._assigned, self._sequence = assigned, parallel.mesh.sp
        self._tokens = [shard.tokens for shard in parallel.shard(grid).all]
        self._all_ranks = parallel.communicator_among(parallel.mesh.denoising)
        self._neighbours = parallel.communicator_among(parallel.mesh.chunk_group(parallel.rank))

    def merge_read(self, parts: Sequence[Partial]) -> Tensor:
        """Merges the read over the keyframes of all ranks.

        A rank receives (ranks - 1)·B·G·H·(d + l) elements, where l is the number of elements of a log-sum-exp. The
        length of the video does not matter.

        Args:
            parts: partial outputs over this rank's own keyframes, each with its log-sum-exp.

        Returns:
            What the queries read, (B, G, H, d), on every rank.
        """
        output, lse = merge(parts)
        if self._all_ranks is None:
            return output
        width, lse_width = output.shape[-1], lse_elements(output.element_size())
        size = (output.numel() // width * (width + lse_width),)

        def unpacked(piece: Tensor) -> Partial:
            both = piece.split([output.numel(), size[0] - output.numel()])
            return both[0].view(output.shape), both[1].view(lse.dtype).view(lse.shape)

        (sent,) = self._all_ranks.buffer("read out", [size], output)
        for target, found in zip(unpacked(sent), (output, lse), strict=True):
            target.copy_(found)
        received = self._all_ranks.all_gather("read", LAYERLESS, [size] * self._all_ranks.size, sent).wait()
        return merge([unpacked(piece) for piece in received])[0]

    def swap(self, velocities: Sequence[Tensor], held_BFSE: Tensor, fused: bool) -> tuple[Tensor | None, Tensor | None]:
        """Swaps the velocities of the frames that this rank's chunks share with those of neighbouring ranks.

        Only the overlap is sent, and only between neighbours. The velocity of the chunk before is always received, that
        of the chunk after only while overlaps are fused.

        Args:
            velocities: of this rank's chunks, each (B, F, s, E).
            held_BFSE: the tokens of the frames that this rank holds.
            fused: whether the overlaps of this step are fused.

        Returns:
            The velocities of the shared frames by the chunk before and by the chunk after, each (B, overlap, s, E);
            None where none is received.
        """
        assigned, communicator, overlap = self._assigned, self._neighbours, self._assigned.config.overlap
        if communicator is None:
            return None, None
        batch, _, tokens, width = held_BFSE.shape
        shared = batch, overlap, tokens, width
        before, after = assigned.rank - 1, assigned.rank + 1
        outgoing: dict[int, Tensor] = {}
        sources: list[int] = []
        if assigned.has_before:
            sources.append(before)
            if fused:
                outgoing[before] = velocities[0][:, :overlap]
        if assigned.has_after:
            outgoing[after] = velocities[-1][:, -overlap:]
            if fused:
                sources.append(after)
        sent = communicator.buffer(
            "overlap out", [shared if n in outgoing else (0,) for n in range(assigned.ranks)], held_BFSE
        )
        for rank, piece in outgoing.items():
            sent[rank].copy_(piece)
        shapes = [shared if n in sources else (0,) for n in range(assigned.ranks)]
        pieces = communicator.all_to_all("overlap", LAYERLESS, shapes, sent).wait()
        return pieces[before] if before in sources else None, pieces[after] if after in sources else None

    def gather(self, held_BFSE: Tensor) -> Tensor:
        """Gathers the tokens of the whole video on every rank.

        Args:
            held_BFSE: the tokens of the frames that this rank holds.

        Returns:
            (B, F, S, E), with all frames of the video and all tokens of each.
        """
        assigned = self._assigned
        owned = held_BFSE[:, assigned.offsets(assigned.owned)]
        if self._all_ranks is None:
            return owned
        batch, _, _, width = held_BFSE.shape
        frames = [len(assigned.of(n).owned) for n in range(assigned.ranks)]
        shapes = [(batch, count, tokens, width) for count in frames for tokens in self._tokens]
        (sent,) = self._all_ranks.buffer("video out", [owned.shape], owned, block=max(map(prod, shapes)))
        sent.copy_(owned)
        received = self._all_ranks.all_gather("latents", LAYERLESS, shapes, sent).wait()
        each = self._sequence
        return torch.cat([torch.cat(received[n * each : (n + 1) * each], 2) for n in range(assigned.ranks)], 1)
