"""Dynamic sequence parallelism (arXiv 2403.10266): the axis that is not attended is sharded, an all-to-all switches it.

For attention within frames a rank holds whole frames; for attention across frames it holds all frames of some tokens.
A rank may hold no frame.

Shapes: B batch, F frames and S tokens of a frame, f and s those of this rank, D numbers in a token, N = B·s.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from causalrope_sp.distributed.communicator import Communicator

KIND = "switch"  # the kind in `CommStats`


class AxisSwitch:
    """Switches a tensor between sharded frames and sharded tokens.

    Args:
        communicator: the ranks that share a pass, or None for one process.
        frames: the frames of the pass that each rank owns, in order of rank.
        tokens: the tokens of a frame that each rank owns, in order of rank.
    """

    def __init__(self, communicator: Communicator | None, frames: Sequence[int], tokens: Sequence[int]) -> None:
        self._communicator, self._frames, self._tokens = communicator, frames, tokens

    def to_tokens(self, layer: int, x_BfSD: Tensor) -> Tensor:
        """Sends this rank's frames to the owners of their tokens.

        Args:
            layer: the layer, for `CommStats`.
            x_BfSD: all tokens of this rank's frames.

        Returns:
            All frames of this rank's tokens, (N, F, D).
        """
        if self._communicator is None:
            return x_BfSD.transpose(1, 2).flatten(0, 1)
        batch, _, _, width = x_BfSD.shape
        own_tokens = self._tokens[self._communicator.rank]
        pieces = x_BfSD.transpose(1, 2).split(list(self._tokens), 1)
        received = self._all_to_all(layer, pieces, [(batch, own_tokens, frames, width) for frames in self._frames])
        return torch.cat(received, 2).flatten(0, 1)

    def to_frames(self, layer: int, x_NFD: Tensor) -> Tensor:
        """Sends this rank's tokens to the owners of their frames.

        Args:
            layer: the layer, for `CommStats`.
            x_NFD: all frames of this rank's tokens.

        Returns:
            All tokens of this rank's frames, (B, f, S, D).
        """
        own_tokens = self._tokens[0 if self._communicator is None else self._communicator.rank]
        x_BFsD = x_NFD.unflatten(0, (-1, own_tokens)).transpose(1, 2)
        if self._communicator is None:
            return x_BFsD
        batch, _, _, width = x_BFsD.shape
        own_frames = self._frames[self._communicator.rank]
        pieces = x_BFsD.split(list(self._frames), 1)
        received = self._all_to_all(layer, pieces, [(batch, own_frames, tokens, width) for tokens in self._tokens])
        return torch.cat(received, 2)

    def _all_to_all(self, layer: int, pieces: Sequence[Tensor], shapes: Sequence[Sequence[int]]) -> list[Tensor]:
        """Sends piece r to rank r. The received pieces, of `shapes`, lie in a buffer, valid until the next call."""
        assert self._communicator is not None, "one process has no collectives"
        sent = self._communicator.buffer("switch out", [piece.shape for piece in pieces], pieces[0])
        for target, piece in zip(sent, pieces, strict=True):
            target.copy_(piece)
        return self._communicator.all_to_all(KIND, layer, shapes, sent).wait()
