"""Dynamic sequence parallelism (arXiv 2403.10266): shard the axis that is not attended, and switch by an all-to-all.

Where attention is within a frame a rank holds whole frames, where it is across frames all frames of some tokens. Frames
and tokens of two ranks differ by at most one.

Shapes: B batch, F frames and S tokens of a frame, f and s those of this rank, D numbers in a token, N = B·s.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from causalrope_sp.distributed.communicator import Communicator
from causalrope_sp.errors import ConfigError
from causalrope_sp.grid import shares

KIND = "switch"  # in the ledger


def split_evenly(count: int, ranks: int, what: str) -> list[int]:
    """`count` things on so many ranks.

    Raises:
        ConfigError: more ranks than things.
    """
    if ranks > count:
        raise ConfigError(f"{ranks} ranks are more than {count} {what}")
    return shares(count, ranks)


def received_by_switches(frames: Sequence[int], tokens: Sequence[int], rank: int, numbers: int) -> tuple[int, int]:
    """Elements that a rank receives on the way to all frames, and on the way back; `numbers` are B·D."""
    to_tokens = (sum(frames) - frames[rank]) * tokens[rank] * numbers
    to_frames = frames[rank] * (sum(tokens) - tokens[rank]) * numbers
    return to_tokens, to_frames


class AxisSwitch:
    """
    Args:
        exchange: the ranks that share a pass, or None for one process.
        frames: of the pass, rank by rank.
        tokens: of a frame, rank by rank.
    """

    def __init__(self, communicator: Communicator | None, frames: Sequence[int], tokens: Sequence[int]) -> None:
        self._communicator, self._frames, self._tokens = communicator, frames, tokens

    def to_tokens(self, layer: int, x_BfSD: Tensor) -> Tensor:
        """All frames of this rank's tokens, (N, F, D)."""
        if self._communicator is None:
            return x_BfSD.transpose(1, 2).flatten(0, 1)
        batch, _, _, width = x_BfSD.shape
        here = self._tokens[self._communicator.rank]
        pieces = x_BfSD.transpose(1, 2).split(list(self._tokens), 1)
        arrived = self._trade(layer, pieces, [(batch, here, frames, width) for frames in self._frames])
        return torch.cat(arrived, 2).flatten(0, 1)

    def to_frames(self, layer: int, x_NFD: Tensor) -> Tensor:
        """All tokens of this rank's frames, (B, f, S, D)."""
        here = self._tokens[0 if self._communicator is None else self._communicator.rank]
        x_BFsD = x_NFD.unflatten(0, (-1, here)).transpose(1, 2)
        if self._communicator is None:
            return x_BFsD
        batch, _, _, width = x_BFsD.shape
        mine = self._frames[self._communicator.rank]
        pieces = x_BFsD.split(list(self._frames), 1)
        arrived = self._trade(layer, pieces, [(batch, mine, tokens, width) for tokens in self._tokens])
        return torch.cat(arrived, 2)

    def _trade(self, layer: int, pieces: Sequence[Tensor], arriving: Sequence[Sequence[int]]) -> list[Tensor]:
        """Piece r to rank r; the pieces that arrive are a buffer's, to be read before the next trade."""
        assert self._communicator is not None, "one process trades nothing"
        sent = self._communicator.buffer("switch out", [piece.shape for piece in pieces], pieces[0])
        for room, piece in zip(sent, pieces, strict=True):
            room.copy_(piece)
        return self._communicator.all_to_all(KIND, layer, arriving, sent).wait()
