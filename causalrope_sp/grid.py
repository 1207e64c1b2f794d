"""The token grid of a latent frame, chunks of frames and shards of tokens. The global time index is defined here alone.

A token's position is a function of its global index alone, g = t·S + y·columns + x, where t is the global time index
(the latent frame's number since the stream began) and S the tokens of a frame. A rank owns tokens [start, stop) of each
frame.

Shapes: B batch, F latent frames, C channels, H×W latent size, S tokens of a frame, s those of one rank, E numbers in a
token.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from causalrope_sp.errors import ConfigError


def shares(total: int, parts: int) -> list[int]:
    """Divides `total` items into so many parts that differ by at most one, the larger parts first."""
    return [total // parts + (part < total % parts) for part in range(parts)]


@dataclass(frozen=True)
class LatentGrid:
    """The size of a latent frame in tokens.

    Args:
        rows: height in tokens.
        columns: width in tokens.
        patch: height and width of a token, in latent pixels.

    Raises:
        ConfigError: `rows` or `columns` is below 1.
    """

    rows: int
    columns: int
    patch: tuple[int, int] = (2, 2)

    def __post_init__(self) -> None:
        if self.rows < 1 or self.columns < 1:
            raise ConfigError(f"a grid of {self.rows}×{self.columns} tokens is empty")

    @classmethod
    def from_latent(cls, height: int, width: int, patch: tuple[int, int] = (2, 2)) -> LatentGrid:
        """Makes the grid of a latent frame of height×width latent pixels.

        Raises:
            ConfigError: the patch does not divide `height` or `width`.
        """
        if height % patch[0] or width % patch[1]:
            raise ConfigError(f"latent size {height}×{width} is not divisible by the patch {patch[0]}×{patch[1]}")
        return cls(height // patch[0], width // patch[1], patch)

    @classmethod
    def from_pixels(cls, height: int, width: int, stride: int, patch: tuple[int, int] = (2, 2)) -> LatentGrid:
        """Makes the grid of a pixel frame.

        Args:
            height: of the frame, in pixels.
            width: of the frame, in pixels.
            stride: the VAE's spatial stride, in pixels a latent pixel.
            patch: height and width of a token, in latent pixels.

        Raises:
            ConfigError: stride × patch does not divide `height` or `width`; the message names the nearest sizes that
                work.
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
        """H, in latent pixels."""
        return self.rows * self.patch[0]

    @property
    def latent_width(self) -> int:
        """W, in latent pixels."""
        return self.columns * self.patch[1]

    def patchify(self, latents_BFCHW: Tensor) -> Tensor:
        """Converts latent frames to tokens, (B, F, S, E); a token holds its patch in the order height, width,
        channel."""
        return rearrange(latents_BFCHW, "b f c (y p) (x q) -> b f (y x) (p q c)", p=self.patch[0], q=self.patch[1])

    def unpatchify(self, tokens_BFSE: Tensor) -> Tensor:
        """Converts tokens to latent frames, (B, F, C, H, W)."""
        p, q = self.patch
        return rearrange(tokens_BFSE, "b f (y x) (p q c) -> b f c (y p) (x q)", y=self.rows, p=p, q=q)


@dataclass(frozen=True)
class Chunk:
    """Consecutive latent frames that are denoised in the same passes.

    Args:
        index: the chunk's number in the stream, counted from 0.
        start: global time index of its first frame.
        frames: its length in latent frames.

    Raises:
        ConfigError: `index` or `start` is below 0, or `frames` below 1.
    """

    index: int
    start: int
    frames: int

    def __post_init__(self) -> None:
        if self.index < 0 or self.start < 0 or self.frames < 1:
            raise ConfigError(
                f"chunk {self.index} of {self.frames} frames from {self.start} is invalid: index and start must be at "
                "least 0, frames at least 1"
            )

    @property
    def stop(self) -> int:
        """Global time index of the frame after its last one."""
        return self.start + self.frames


def split_into_chunks(
    frames: int | None, chunk_frames: int, *, independent_first_frame: bool = False, index: int = 0, start: int = 0
) -> Iterator[Chunk]:
    """Cuts a stream into chunks.

    Args:
        frames: latent frames to cut; None yields chunks without end.
        chunk_frames: latent frames of a chunk; the last chunk may be shorter.
        independent_first_frame: whether the stream's first frame (global time index 0) is a chunk of its own.
        index: the number of the first chunk.
        start: global time index of the first frame.

    Yields:
        The chunks in order.
    """
    stop = None if frames is None else start + frames
    while stop is None or start < stop:
        size = 1 if independent_first_frame and start == 0 else chunk_frames
        chunk = Chunk(index, start, size if stop is None else min(size, stop - start))
        yield chunk
        index, start = index + 1, chunk.stop


@dataclass(frozen=True)
class Shard:
    """The tokens [start, stop) that one rank owns of every frame; the shards of two ranks differ by at most one token.

    Args:
        grid: the latent frame in tokens.
        rank: the rank's number on the `sp` axis.
        ranks: ranks on that axis.

    Raises:
        ConfigError: `rank` is not in 0…ranks-1, or there are more ranks than tokens in a frame.
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
        """Number within a frame of its first token."""
        whole, rest = divmod(self.grid.tokens, self.ranks)
        return self.rank * whole + min(self.rank, rest)

    @property
    def tokens(self) -> int:
        """s, how many tokens of a frame this rank owns."""
        whole, rest = divmod(self.grid.tokens, self.ranks)
        return whole + (self.rank < rest)

    @property
    def stop(self) -> int:
        """Number within a frame of the token after its last one."""
        return self.start + self.tokens

    @property
    def all(self) -> tuple[Shard, ...]:
        """The shards of all ranks, in order."""
        return tuple(Shard(self.grid, rank, self.ranks) for rank in range(self.ranks))

    def rows_and_columns(self) -> tuple[Tensor, Tensor]:
        """Returns row y and column x of this rank's tokens within a frame, each of shape (s,)."""
        token = torch.arange(self.start, self.stop)
        return token // self.grid.columns, token % self.grid.columns
