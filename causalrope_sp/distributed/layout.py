"""Attention strategies by name, and how each of them arranges the ranks of the `sp` axis.

A product `ulysses{U}x{inner}{R}` arranges P = U·R ranks in R rows of U columns; rank p has row p // U and column p % U.
The ranks of a row exchange tokens for heads (`ulysses`). The ranks of a column have the same heads and share the tokens
by the inner strategy.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from causalrope_sp.errors import ConfigError
from causalrope_sp.grid import LatentGrid, Shard, shares

AUTO = "auto"  # the strategy that is predicted to be the fastest
SINGLE = "single"  # the name of every strategy on one rank
GATHER_KV, SHARD_KV = INNER = ("gather-kv", "shard-kv")
STRATEGIES = ("ulysses", *INNER)
_PRODUCT = re.compile(rf"ulysses(\d+)x({'|'.join(INNER)})(\d+)")
KNOWN = f"{', '.join(STRATEGIES)}, and products such as ulysses4xgather-kv2"


@dataclass(frozen=True)
class Layout:
    """A strategy for a number of ranks.

    Args:
        name: the name of the strategy.
        ranks: P, the ranks of the `sp` axis.
        ulysses: U, the ranks of a row, which exchange tokens for heads.
        inner: the strategy by which the ranks of a column share the tokens, or None.
    """

    name: str
    ranks: int
    ulysses: int
    inner: str | None

    @property
    def sharing(self) -> int:
        """R, the ranks that share the tokens of one head group."""
        return self.ranks // self.ulysses

    def coordinates(self, rank: int) -> tuple[int, int]:
        """Returns the row and the column of a rank."""
        return divmod(rank, self.ulysses)

    def rows(self, tokens: Sequence[int]) -> list[list[int]]:
        """Arranges the tokens of a frame that each rank owns, in order of rank, by row."""
        return [list(tokens[r * self.ulysses : (r + 1) * self.ulysses]) for r in range(self.sharing)]

    def check(self, heads: int) -> None:
        """Checks that every rank has a head.

        Args:
            heads: the attention heads of the model.

        Raises:
            ConfigError: there are fewer heads than `ulysses` ranks.
        """
        if self.ulysses > heads:
            raise ConfigError(
                f"{self.name} needs at least one head a rank: {heads} heads, {self.ulysses} ranks; use gather-kv"
            )

    def heads(self, heads: int) -> list[int]:
        """Returns how many of the model's heads each column attends; the numbers differ by at most one."""
        return shares(heads, self.ulysses)


def token_spans(layout: Layout, grid: LatentGrid, rank: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Returns the tokens of a frame whose queries a rank attends, and those whose keys it attends them on.

    Args:
        layout: how the ranks of the `sp` axis share the work.
        grid: the latent frame in tokens.
        rank: its number on the `sp` axis.

    Returns:
        Two ranges [first, stop).
    """
    rows = [sum(row) for row in layout.rows([shard.tokens for shard in Shard(grid, 0, layout.ranks).all])]
    row, _ = layout.coordinates(rank)
    own, whole = (sum(rows[:row]), sum(rows[: row + 1])), (0, grid.tokens)
    return (whole, own) if layout.inner == SHARD_KV else (own, whole)


def check_name(name: str) -> None:
    """Checks that a strategy of this name exists for some number of ranks.

    Raises:
        ConfigError: there is none.
    """
    if name not in STRATEGIES and not _PRODUCT.fullmatch(name):
        raise ConfigError(f"unknown strategy {name!r}; there are: auto, {KNOWN}")


def parse_strategy(name: str, ranks: int) -> Layout:
    """Returns the layout of a strategy.

    Args:
        name: one of `STRATEGIES`, or a product such as ulysses4xgather-kv2.
        ranks: P, the ranks of the `sp` axis.

    Raises:
        ConfigError: the name is unknown, or it is a product for another number of ranks.
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


def check_head_groups(groups: int, strategy: str, ranks: int, heads: int) -> None:
    """Checks that outputs can be sent in so many groups of heads.

    Args:
        groups: the number of groups; 1 sends all heads at once.
        strategy: the name of the strategy, or "auto".
        ranks: P, the ranks of the `sp` axis.
        heads: the attention heads of the model.

    Raises:
        ConfigError: the strategy is one that has no groups, or a rank has fewer heads than groups.
    """
    if groups == 1:
        return
    if strategy not in (AUTO, "ulysses"):
        raise ConfigError(f"head_groups must be 1 with strategy {strategy}, which does not send heads, not {groups}")
    least = max(1, heads // ranks)
    if groups > least:
        raise ConfigError(
            f"head_groups must be at most {least}, the heads of a rank ({heads} heads, {ranks} ranks), not {groups}"
        )


def strategies(ranks: int, heads: int) -> list[str]:
    """Returns the names of all strategies that this many ranks can use for a model of this many heads."""
    names = [name for name in STRATEGIES if name != "ulysses" or ranks <= heads]
    products = [u for u in range(2, min(ranks, heads + 1)) if ranks % u == 0]
    return names if ranks == 1 else names + [f"ulysses{u}x{inner}{ranks // u}" for u in products for inner in INNER]
