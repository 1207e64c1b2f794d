"""The assignment of frames to overlapping chunks, and of chunks to ranks of the `chunk` axis: pure integer arithmetic.

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
    """Cuts a video into overlapping chunks.

    Args:
        frames: latent frames of the video.
        config: the chunk's length and the overlap, in latent frames.
        start: the global time index of the first frame.

    Returns:
        The chunks in order. The last may be shorter than the others, but owns at least one frame.

    Raises:
        ConfigError: `frames` is below 1.
    """
    if frames < 1:
        raise ConfigError(f"frames must be at least 1, not {frames}")
    stride = config.chunk_frames - config.overlap
    count = 1 + max(0, -(-(frames - config.chunk_frames) // stride))
    firsts = [n * stride for n in range(count)]
    return tuple(Chunk(n, start + at, min(config.chunk_frames, frames - at)) for n, at in enumerate(firsts))


@dataclass(frozen=True)
class AssignedChunks:
    """The neighbouring chunks of a video that one rank of the `chunk` axis denoises; none if there are more ranks than
    chunks.

    Args:
        every: all chunks of the video.
        config: how the video was cut.
        rank: this rank's number on the `chunk` axis.
        ranks: ranks on that axis.
    """

    every: tuple[Chunk, ...]
    config: ParallelChunksConfig
    rank: int = 0
    ranks: int = 1

    @property
    def numbers(self) -> range:
        """The numbers of this rank's chunks; the counts of two ranks differ by at most one."""
        whole, rest = divmod(len(self.every), self.ranks)
        first = self.rank * whole + min(self.rank, rest)
        return range(first, first + whole + (self.rank < rest))

    @property
    def chunks(self) -> tuple[Chunk, ...]:
        """This rank's chunks."""
        return self.every[self.numbers.start : self.numbers.stop]

    @property
    def held(self) -> range:
        """The global time indices of the frames whose latents this rank holds, its context included."""
        return range(self.chunks[0].start, self.chunks[-1].stop) if self.chunks else range(0)

    @property
    def owned(self) -> range:
        """The global time indices of the frames that this rank owns; over all ranks, in order, they are the video."""
        return self.held[self.config.overlap :] if self.has_before else self.held

    @property
    def has_before(self) -> bool:
        """Whether there is a chunk before this rank's first one, which is another rank's."""
        return bool(self.chunks) and self.numbers.start > 0

    @property
    def has_after(self) -> bool:
        """Whether there is a chunk after this rank's last one, which is another rank's."""
        return bool(self.chunks) and self.numbers.stop < len(self.every)

    @property
    def keyframes(self) -> range:
        """The global time indices of the keyframes that this rank owns: one every `keyframe_every` latent frames, from
        the video's first frame on."""
        every, first = self.config.keyframe_every, self.every[0].start
        if not self.owned:
            return range(0)
        begin = first + -(-(self.owned.start - first) // every) * every
        return range(begin, self.owned.stop, every)

    def of(self, rank: int) -> AssignedChunks:
        """Returns the chunks assigned to another rank."""
        return AssignedChunks(self.every, self.config, rank, self.ranks)

    def offsets(self, frames: Sequence[int]) -> list[int]:
        """Returns the indices of frames, numbered by global time index, among the frames that this rank holds."""
        return [frame - self.held.start for frame in frames]
