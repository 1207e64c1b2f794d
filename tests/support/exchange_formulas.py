"""How many elements a rank receives in the exchanges of parallel chunks and of Latte, by formula."""

from __future__ import annotations

from collections.abc import Sequence

from causalrope_sp.attention.base import lse_elements
from causalrope_sp.config import DiTConfig
from causalrope_sp.vin.chunks import AssignedChunks
from causalrope_sp.vin.vin_config import VINConfig


def read_elements(vin: VINConfig, ranks: int, batch: int, itemsize: int) -> int:
    """Counts the elements that a rank receives in a step's read: the partial outputs of all other ranks. The length of
    the video does not matter; `itemsize` is in bytes."""
    return (ranks - 1) * batch * vin.global_tokens * (vin.dim + vin.heads * lse_elements(itemsize))


def overlap_elements(config: DiTConfig, assigned: AssignedChunks, tokens: int, batch: int, fused: bool) -> int:
    """Counts the elements that a rank receives in a step for the frames shared with its neighbours on the `chunk` axis;
    `tokens` is the number of tokens of a frame on this rank."""
    sides = assigned.has_before + (assigned.has_after and fused)
    return sides * batch * assigned.config.overlap * tokens * config.token_dim


def received_by_switches(frames: Sequence[int], tokens: Sequence[int], rank: int, numbers: int) -> tuple[int, int]:
    """Computes the elements that a rank receives by `AxisSwitch.to_tokens` and by `AxisSwitch.to_frames`.

    Args:
        frames: the frames of each rank, in order of rank.
        tokens: the tokens of a frame of each rank, in order of rank.
        rank: the rank.
        numbers: B·D.
    """
    to_tokens = (sum(frames) - frames[rank]) * tokens[rank] * numbers
    to_frames = frames[rank] * (sum(tokens) - tokens[rank]) * numbers
    return to_tokens, to_frames
