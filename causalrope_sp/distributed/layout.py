"""Strategies by name: how many ranks trade tokens for heads, and how the rest share the tokens.

Rank p of a product `ulysses{U}x{inner}{R}` is the u-th of the r-th U neighbours, p = r·U + u: neighbours trade tokens
for heads, and the R ranks with the same heads share tokens by the inner strategy.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from causalrope_sp.errors import ConfigError
from causalrope_sp.grid import shares

AUTO = "auto"  # the fastest by prediction
SINGLE = "single"  # what every strategy is on one rank
INNER = ("gather-kv", "shard-kv")
STRATEGIES = ("ulysses", *INNER)
_PRODUCT = re.compile(rf"ulysses(\d+)x({'|'.join(INNER)})(\d+)")
KNOWN = f"{', '.join(STRATEGIES)}, and products such as ulysses4xgather-kv2"


@dataclass(frozen=True)
class Layout:
    """A strategy at a number of ranks: `ulysses` ranks trade, `ranks // ulysses` share tokens by `inner`."""

    name: str
    ranks: int
    ulysses: int
    inner: str | None

    @property
    def sharing(self) -> int:
        """R, the ranks that share the tokens of one head group."""
        return self.ranks // self.ulysses

    def coordinates(self, rank: int) -> tuple[int, int]:
        """(row, column): which ranks this one trades with, and which it shares tokens with."""
        return divmod(rank, self.ulysses)

    def rows(self, tokens: Sequence[int]) -> list[list[int]]:
        """Every rank's tokens of a frame, row by row."""
        return [list(tokens[r * self.ulysses : (r + 1) * self.ulysses]) for r in range(self.sharing)]

    def check(self, heads: int) -> None:
        """Raises ConfigError if a rank would be left without a head."""
        if self.ulysses > heads:
            raise ConfigError(
                f"{self.name} needs at least one head a rank: {heads} heads, {self.ulysses} ranks; use gather-kv"
            )

    def heads(self, heads: int) -> list[int]:
        """How many heads each of the trading ranks attends; they differ by at most one."""
        return shares(heads, self.ulysses)


def check_name(name: str) -> None:
    """Raises ConfigError if no number of ranks has a strategy of this name."""
    if name not in STRATEGIES and not _PRODUCT.fullmatch(name):
        raise ConfigError(f"unknown strategy {name!r}; there are: auto, {KNOWN}")


def parse_strategy(name: str, ranks: int) -> Layout:
    """
    Raises:
        ConfigError: an unknown name, or a product of another number of ranks.
    """
    if ranks == 1 and name in (SINGLE, *STRATEGIES):
        return Layout(SINGLE, 1, 1, None)
    if name == "ulysses":
        return Layout(name, ranks, ranks, None)
    if name in INNER:
        return Layout(name, ranks, 1, name)
    check_name(name)
    match = _PRODUCT.fullmatch(name)
    assert match, "checked"
    outer, inner, sharing = int(match[1]), match[2], int(match[3])
    if outer * sharing != ranks or outer < 2 or sharing < 2:
        raise ConfigError(f"{name} is a strategy for {outer}×{sharing} ranks, each 2 or more, and not for {ranks}")
    return Layout(name, ranks, outer, inner)


def strategies(ranks: int, heads: int) -> list[str]:
    """The names of all strategies that this many ranks can use for a model of this many heads."""
    names = [name for name in STRATEGIES if name != "ulysses" or ranks <= heads]
    products = [u for u in range(2, min(ranks, heads + 1)) if ranks % u == 0]
    return names if ranks == 1 else names + [f"ulysses{u}x{inner}{ranks // u}" for u in products for inner in INNER]
