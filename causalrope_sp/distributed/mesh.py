"""Which rank does what, as data, checked before any group exists.

A *lane* is the ranks that share the tokens of one forward, neighbours. Most streams have one lane; guidance may give
each of its two branches one, chunks made in parallel several. Behind the lanes come the ranks that only decode.
"""

from __future__ import annotations

from dataclasses import dataclass

from causalrope_sp.errors import ConfigError


@dataclass(frozen=True)
class Mesh:
    """`ranks` ranks, of which the last `decoders` decode and the others denoise in `lanes` lanes of equal size.

    Raises:
        ConfigError: a number below its minimum, no rank left to denoise, or lanes of different sizes.
    """

    ranks: int
    lanes: int = 1
    decoders: int = 0

    def __post_init__(self) -> None:
        if min(self.ranks, self.lanes) < 1 or self.decoders < 0:
            raise ConfigError(f"{self.ranks} ranks, {self.lanes} lanes and {self.decoders} decode ranks are no mesh")
        denoising = self.ranks - self.decoders
        if denoising < 1:
            raise ConfigError(f"{self.decoders} decode ranks leave none of {self.ranks} ranks to denoise")
        if denoising % self.lanes:
            raise ConfigError(f"{denoising} ranks that denoise cannot be cut into {self.lanes} lanes of equal size")

    @property
    def sequence(self) -> int:
        """P, the ranks of a lane."""
        return (self.ranks - self.decoders) // self.lanes

    @property
    def denoising(self) -> range:
        return range(self.ranks - self.decoders)

    @property
    def decoding(self) -> range:
        return range(self.ranks - self.decoders, self.ranks)

    def place(self, rank: int) -> tuple[int, int]:
        """(lane, place in it) of a rank that denoises."""
        return divmod(rank, self.sequence)

    def lane(self, number: int) -> range:
        """The ranks of a lane, in order."""
        return range(number * self.sequence, (number + 1) * self.sequence)

    def across(self, place: int) -> range:
        """The ranks at the same place of every lane: they own the same tokens."""
        return range(place, self.lanes * self.sequence, self.sequence)


def possible_lanes(guided: bool, ranks: int) -> list[int]:
    """In how many lanes so many ranks can run a stream: of two halves each can have a branch of guidance."""
    return [1, 2] if guided and ranks % 2 == 0 else [1]
