"""The mesh of ranks: the work of every rank as data that is checked before any process group exists.

The ranks that denoise form a mesh with three axes: `cfg` (the conditional and unconditional branch of guidance),
`chunk` (chunks that a Video Interface Network denoises in parallel) and `sp` (the tokens of every frame). Neighbouring
ranks differ in `sp` first. The ranks of the `decode` axis come last and only decode.
"""

from __future__ import annotations

from dataclasses import dataclass

from causalrope_sp.checks import check_whole
from causalrope_sp.errors import ConfigError


@dataclass(frozen=True)
class Mesh:
    """The shape of the mesh. The size of the `sp` axis follows from the others.

    Args:
        ranks: how many processes there are.
        cfg: the size of the `cfg` axis, 1 or 2.
        chunk: the size of the `chunk` axis.
        decode: how many of the last ranks only decode.

    Raises:
        ConfigError: a size is not a whole number or is below its minimum, no rank is left to denoise, or the axes do
            not divide the ranks.
    """

    ranks: int
    cfg: int = 1
    chunk: int = 1
    decode: int = 0

    def __post_init__(self) -> None:
        for name, least in (("ranks", 1), ("cfg", 1), ("chunk", 1), ("decode", 0)):
            object.__setattr__(self, name, check_whole(name, getattr(self, name), least))
        denoising = self.ranks - self.decode
        if denoising < 1:
            raise ConfigError(f"decode: expected fewer than the {self.ranks} ranks, got {self.decode} decode ranks")
        if denoising % (self.cfg * self.chunk):
            axes = " and ".join(f"{name} {size}" for name, size in self._outer_axes.items())
            raise ConfigError(f"{axes}: expected a divisor of the {denoising} ranks that denoise")

    @property
    def _outer_axes(self) -> dict[str, int]:
        """The axes other than `sp` that have more than one rank."""
        return {name: size for name, size in (("cfg", self.cfg), ("chunk", self.chunk)) if size > 1}

    @property
    def sp(self) -> int:
        """P, the size of the sequence-parallel axis."""
        return (self.ranks - self.decode) // (self.cfg * self.chunk)

    @property
    def denoising(self) -> range:
        """The ranks that denoise."""
        return range(self.ranks - self.decode)

    @property
    def decoding(self) -> range:
        """The ranks that only decode."""
        return range(self.ranks - self.decode, self.ranks)

    def coordinates(self, rank: int) -> tuple[int, int, int]:
        """Returns the coordinates (cfg, chunk, sp) of a rank that denoises."""
        outer, sp = divmod(rank, self.sp)
        return *divmod(outer, self.chunk), sp

    def rank(self, cfg: int, chunk: int, sp: int) -> int:
        """Returns the rank at these coordinates."""
        return (cfg * self.chunk + chunk) * self.sp + sp

    def sp_group(self, rank: int) -> range:
        """Returns the ranks that share the tokens of `rank`'s frames, in order of `sp`."""
        first = rank - rank % self.sp
        return range(first, first + self.sp)

    def cfg_group(self, rank: int) -> list[int]:
        """Returns the ranks that own the same tokens of the same chunks as `rank`, in order of `cfg`."""
        _, chunk, sp = self.coordinates(rank)
        return [self.rank(cfg, chunk, sp) for cfg in range(self.cfg)]

    def chunk_group(self, rank: int) -> list[int]:
        """Returns the ranks that own the same tokens as `rank` in the same branch of guidance, in order of `chunk`."""
        cfg, _, sp = self.coordinates(rank)
        return [self.rank(cfg, chunk, sp) for chunk in range(self.chunk)]


def possible_cfg_sizes(guided: bool, ranks: int) -> list[int]:
    """Returns the sizes that the `cfg` axis can have.

    Args:
        guided: whether the stream uses guidance.
        ranks: how many ranks denoise.
    """
    return [1, 2] if guided and ranks % 2 == 0 else [1]
