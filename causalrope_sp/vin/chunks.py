"""Which frames are in which chunk, and which chunks on which lane: pure integer arithmetic.

Neighbouring chunks overlap: the first `overlap` frames of every chunk but the first are the last of the chunk before,
which owns them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from causalrope_sp.errors import ConfigError
from causalrope_sp.grid import Chunk
from causalrope_sp.vin.vin_config import ParallelChunksConfig


def cut(frames: int, config: ParallelChunksConfig, start: int = 0) -> tuple[Chunk, ...]:
    """The chunks of a video of `frames` latent frames from global time index `start` on; the last may be shorter, but
    has frames of its own.

    Raises:
        ConfigError: no frames.
    """
    if frames < 1:
        raise ConfigError(f"frames must be at least 1, not {frames}")
    stride = config.chunk_frames - config.overlap
    count = 1 + max(0, -(-(frames - config.chunk_frames) // stride))
    firsts = [n * stride for n in range(count)]
    return tuple(Chunk(n, start + at, min(config.chunk_frames, frames - at)) for n, at in enumerate(firsts))


@dataclass(frozen=True)
class AssignedChunks:
    """What one lane denoises of a video: some chunks, neighbours; none if there are more lanes than chunks."""

    every: tuple[Chunk, ...]
    config: ParallelChunksConfig
    rank: int = 0
    ranks: int = 1

    @property
    def numbers(self) -> range:
        """Those of this lane's chunks; counts of two lanes differ by at most one."""
        whole, rest = divmod(len(self.every), self.ranks)
        first = self.rank * whole + min(self.rank, rest)
        return range(first, first + whole + (self.rank < rest))

    @property
    def mine(self) -> tuple[Chunk, ...]:
        return self.every[self.numbers.start : self.numbers.stop]

    @property
    def held(self) -> range:
        """The global time indices that the lane keeps latents of, its context included."""
        return range(self.mine[0].start, self.mine[-1].stop) if self.mine else range(0)

    @property
    def owned(self) -> range:
        """Those that no other lane owns; over all lanes, in order, they are the video."""
        return self.held[self.config.overlap :] if self.has_before else self.held

    @property
    def has_before(self) -> bool:
        """Whether the chunk before this lane's first is another lane's,"""
        return bool(self.mine) and self.numbers.start > 0

    @property
    def has_after(self) -> bool:
        """and the chunk after its last."""
        return bool(self.mine) and self.numbers.stop < len(self.every)

    @property
    def keyframes(self) -> range:
        """The keyframes that the lane owns: one every `keyframe_every` frames from the video's first on."""
        every, first = self.config.keyframe_every, self.every[0].start
        if not self.owned:
            return range(0)
        begin = first + -(-(self.owned.start - first) // every) * every
        return range(begin, self.owned.stop, every)

    def of(self, rank: int) -> AssignedChunks:
        """What another lane denoises."""
        return AssignedChunks(self.every, self.config, rank, self.ranks)

    def places(self, frames: Sequence[int]) -> list[int]:
        """Where frames stand among those held."""
        return [frame - self.held.start for frame in frames]
