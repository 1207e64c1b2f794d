"""Grid, chunks, shards: the sole owner of the global time index.

A token's position is a function of nothing but its global index g = t·S + y·columns + x, where t is the latent
frame's number since the stream began and S the tokens of a frame. A rank owns tokens [start, stop) of every frame.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from causalrope_sp.errors import ConfigError


def shares(total: int, parts: int) -> list[int]:
    """`total` things in so many parts that differ by at most one, the larger ones first."""
    return [total // parts + (part < total % parts) for part in range(parts)]


@dataclass(frozen=True)
class LatentGrid:
    """Height and width of a latent frame in tokens, and the patch that makes a token.

    Raises:
        ConfigError: no token in some direction.
    """

    rows: int
    columns: int
    patch: tuple[int, int] = (2, 2)

    def __post_init__(self) -> None:
        if self.rows < 1 or self.columns < 1:
            raise ConfigError(f"a grid of {self.rows}×{self.columns} tokens is empty")

    @classmethod
    def from_latent(cls, height: int, width: int, patch: tuple[int, int] = (2, 2)) -> LatentGrid:
        """The grid of a latent of height×width latent pixels.

        Raises:
            ConfigError: a size that the patch does not divide.
        """
        if height % patch[0] or width % patch[1]:
            raise ConfigError(f"latent size {height}×{width} is not divisible by the patch {patch[0]}×{patch[1]}")
        return cls(height // patch[0], width // patch[1], patch)

    @classmethod
    def from_pixels(cls, height: int, width: int, stride: int, patch: tuple[int, int] = (2, 2)) -> LatentGrid:
        """The grid of a picture of height×width pixels behind a VAE of the given spatial stride.

        Raises:
            ConfigError: a size that stride × patch does not divide; the message names the nearest sizes that work.
        """
        for name, size, step in (("height", height, stride * patch[0]), ("width", width, stride * patch[1])):
            if size < 1 or size % step:
                below, above = size // step * step, max(1, size // step + 1) * step
                near = f"{below} or {above}" if below > 0 else f"{above}"
                raise ConfigError(f"{name} {size} is not divisible by {step}; the nearest that work: {near}")
        return cls(height // stride // patch[0], width // stride // patch[1], patch)

    @property
    def tokens(self) -> int:
        """S, the tokens of one frame."""
        return self.rows * self.columns

    @property
    def latent_height(self) -> int:
        return self.rows * self.patch[0]

    @property
    def latent_width(self) -> int:
        return self.columns * self.patch[1]

    def patchify(self, latents_BFCHW: Tensor) -> Tensor:
        """Tokens (B, F, S, E) of latent frames; a token holds its patch as (patch height, patch width, channel)."""
        return rearrange(latents_BFCHW, "b f c (y p) (x q) -> b f (y x) (p q c)", p=self.patch[0], q=self.patch[1])

    def unpatchify(self, tokens_BFSE: Tensor) -> Tensor:
        """Latent frames (B, F, C, H, W) of tokens."""
        p, q = self.patch
        return rearrange(tokens_BFSE, "b f (y x) (p q c) -> b f c (y p) (x q)", y=self.rows, p=p, q=q)


@dataclass(frozen=True)
class Chunk:
    """The latent frames [start, start + frames), denoised together; `start` is a global time index."""

    index: int
    start: int
    frames: int

    def __post_init__(self) -> None:
        if self.index < 0 or self.start < 0 or self.frames < 1:
            raise ConfigError(f"chunk {self.index} of {self.frames} frames from {self.start} is not a stretch of time")

    @property
    def stop(self) -> int:
        return self.start + self.frames


def split_into_chunks(
    frames: int | None, chunk_frames: int, *, independent_first_frame: bool = False, index: int = 0, start: int = 0
) -> Iterator[Chunk]:
    """Cuts `frames` latent frames from global time index `start` on into chunks; the last one may be shorter.

    None goes on for ever.
    With `independent_first_frame` the stream's very first frame (start = 0) is a chunk of its own.
    """
    stop = None if frames is None else start + frames
    while stop is None or start < stop:
        size = 1 if independent_first_frame and start == 0 else chunk_frames
        chunk = Chunk(index, start, size if stop is None else min(size, stop - start))
        yield chunk
        index, start = index + 1, chunk.stop


@dataclass(frozen=True)
class Shard:
    """The tokens [start, stop) of every frame that one rank owns; ranges of two ranks differ by at most one token.

    Raises:
        ConfigError: a rank outside 0…ranks-1, or more ranks than tokens in a frame.
    """

    grid: LatentGrid
    rank: int = 0
    ranks: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.ranks:
            raise ConfigError(f"rank {self.rank} is not one of {self.ranks}")
        if self.ranks > self.grid.tokens:
            raise ConfigError(f"{self.ranks} ranks are more than the {self.grid.tokens} tokens of a frame")

    @property
    def start(self) -> int:
        whole, rest = divmod(self.grid.tokens, self.ranks)
        return self.rank * whole + min(self.rank, rest)

    @property
    def tokens(self) -> int:
        """s, the tokens of one frame that this rank owns."""
        whole, rest = divmod(self.grid.tokens, self.ranks)
        return whole + (self.rank < rest)

    @property
    def stop(self) -> int:
        return self.start + self.tokens

    @property
    def all(self) -> tuple[Shard, ...]:
        """The shards of all ranks, in order."""
        return tuple(Shard(self.grid, rank, self.ranks) for rank in range(self.ranks))

    def rows_and_columns(self) -> tuple[Tensor, Tensor]:
        """(y, x) of this rank's tokens within any frame, each of shape (s,)."""
        place = torch.arange(self.start, self.stop)
        return place // self.grid.columns, place % self.grid.columns
