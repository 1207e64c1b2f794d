"""Sizes of a Video Interface Network, and how a video is cut into chunks that are denoised together."""

from __future__ import annotations

from dataclasses import dataclass

from causalrope_sp.checks import check_fields, check_whole
from causalrope_sp.errors import ConfigError


def check_preview(every: int | None) -> None:
    """Raises ConfigError for an interval between previews that is no whole number of at least 1; None is none."""
    if every is not None:
        check_whole("preview_every", every)


@dataclass(frozen=True)
class VINConfig:
    """`global_tokens` tokens of width `dim`, processed by `layers` blocks of `heads` heads.

    Raises:
        ConfigError: a size below 1, or a width that the heads do not divide.
    """

    global_tokens: int
    dim: int
    heads: int
    layers: int

    def __post_init__(self) -> None:
        check_fields(self, ["global_tokens", "dim", "heads", "layers"])
        if self.dim % self.heads:
            raise ConfigError(f"VINConfig.dim {self.dim} is not divisible by its {self.heads} heads")


@dataclass(frozen=True)
class ParallelChunksConfig:
    """How a video is cut, in latent frames: chunks of `chunk_frames`, of which neighbours share `overlap`.

    The shared frames are both things that the paper gives a chunk: the end of the chunk before, which it sees as
    context, and the frames whose velocities are fused. One keyframe every `keyframe_every` latent frames is read into
    the global tokens. Fusion goes on while more than the share `fuse_above` of the steps is left.

    Raises:
        ConfigError: a length below 1, an overlap of more than half a chunk (a frame would be in three), a share outside
            [0, 1].
    """

    chunk_frames: int
    overlap: int
    keyframe_every: int
    fuse_above: float = 0.4

    def __post_init__(self) -> None:
        check_fields(self, ["chunk_frames", "overlap", "keyframe_every"])
        if 2 * self.overlap > self.chunk_frames:
            raise ConfigError(
                f"an overlap of {self.overlap} is more than half of a chunk of {self.chunk_frames} frames"
            )
        if not isinstance(self.fuse_above, int | float) or not 0 <= self.fuse_above <= 1:
            raise ConfigError(f"fuse_above is a share of the steps, from 0 to 1, not {self.fuse_above!r}")

    def filled_by(self, chunks: int) -> int:
        """The latent frames that so many whole chunks cover."""
        return self.chunk_frames + (chunks - 1) * (self.chunk_frames - self.overlap)

    def fuses(self, step: int, steps: int) -> bool:
        """Whether step `step` of `steps`, counted from 0, is early enough: t > t_α with t = steps - step left."""
        return steps - step > self.fuse_above * steps


# The paper's: 20 latents a chunk at 5 latents for 16 frames, so its overlap of 12 frames is 3.75 of them and its
# keyframe a second, at 16 frames a second, is one in 5; t_α = 20 of 50 steps.
PAPER_VIN = VINConfig(global_tokens=512, dim=4096, heads=32, layers=4)
PAPER_CHUNKS = ParallelChunksConfig(chunk_frames=20, overlap=4, keyframe_every=5, fuse_above=0.4)
