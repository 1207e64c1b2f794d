"""What torchrun, or another launcher, says in the environment: which rank this process is, and of how many."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Self

from causalrope_sp.errors import ConfigError, printable

MOST_RANKS = 1 << 16


@dataclass(frozen=True)
class RankEnvironment:
    """The numbers that a launcher gives a process; without a launcher those of a single process.

    Attributes:
        world_size: how many ranks there are.
        rank: this process's number among them.
        local_world_size: how many of them are on this machine.
        local_rank: this process's number among those.
        group_rank: the number of this machine.
    """

    world_size: int
    rank: int
    local_world_size: int
    local_rank: int
    group_rank: int

    @classmethod
    def read(cls) -> Self:
        """Reads the environment of this process.

        Raises:
            ConfigError: a variable is not a whole number, or a rank is not below the number of ranks.
        """
        world = _number("WORLD_SIZE", 1, 1)
        rank, local = _number("RANK", 0, 0), _number("LOCAL_RANK", 0, 0)
        if world > 1 and rank >= world:
            raise ConfigError(f"RANK in the environment must be below WORLD_SIZE, which is {world}, not {rank}")
        return cls(
            world, rank if world > 1 else 0, _number("LOCAL_WORLD_SIZE", 1, 1), local, _number("GROUP_RANK", 0, 0)
        )

    def check_rendezvous(self) -> None:
        """Checks that several ranks can find each other.

        Raises:
            ConfigError: RANK, MASTER_ADDR or MASTER_PORT is missing, or the port is none.
        """
        if self.world_size == 1:
            return
        for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
            if not os.environ.get(name):
                raise ConfigError(
                    f"WORLD_SIZE in the environment says that there are {self.world_size} ranks, but {name} is "
                    "missing: start the ranks with torchrun, or unset WORLD_SIZE"
                )
        _number("MASTER_PORT", 0, 0, 65535)


def _number(name: str, default: int, least: int, most: int = MOST_RANKS) -> int:
    """A variable of the environment as a number."""
    text = os.environ.get(name)
    if text is None:
        return default
    digits = text.removeprefix("-")
    if not (digits.isascii() and digits.isdigit() and len(digits) <= 9 and least <= int(text) <= most):
        raise ConfigError(
            f"{name} in the environment must be a whole number of at least {least} and at most {most}, "
            f"not {printable(repr(text))}: torchrun sets it"
        )
    return int(text)
