"""The order in which the columns of ranks of `ulysses` hold the heads of a layer.

Shapes: H heads of a layer, d head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from itertools import chain

from torch import Tensor

from causalrope_kernels import Slots
from causalrope_kernels.tables import on_device


@dataclass(frozen=True)
class HeadPlacement:
    """The heads of one layer by column of ranks; the heads of a column are in order of their rings.

    Args:
        columns: the numbers of the heads that each column attends, in the order in which it holds them.
    """

    columns: tuple[tuple[int, ...], ...]

    @cached_property
    def sizes(self) -> list[int]:
        """How many heads each column has."""
        return [len(column) for column in self.columns]

    @cached_property
    def order(self) -> tuple[int, ...]:
        """The numbers of the heads, column by column."""
        return tuple(chain.from_iterable(self.columns))

    @cached_property
    def in_order(self) -> bool:
        """Whether the heads are in the order of the model."""
        return self.order == tuple(range(len(self.order)))

    def by_head(self, parts: Sequence[Slots]) -> Sequence[Slots]:
        """Sorts slots by the model's order of heads, for `norm_rope_store`.

        Args:
            parts: slots of all heads in the order of the placement, split in any way.

        Returns:
            The same memory: views of as few heads as their order demands.
        """
        if self.in_order:
            return parts
        found = []
        for number, first, count in _runs(self._places, tuple(part.x.shape[3] for part in parts)):
            part, heads = parts[number], slice(first, first + count)
            memory, scales = (None if x is None else x[:, :, :, heads] for x in (part.memory, part.scales))
            found.append(replace(part, x=part.x[:, :, :, heads], memory=memory, scales=scales))
        return found

    def in_model_order(self, x: Tensor, axis: int) -> Tensor:
        """Returns a tensor with its axis of heads, which are in the order of the placement, in that of the model."""
        if self.in_order:
            return x
        return x.index_select(axis, on_device((self._places,), x.device)[0])

    @cached_property
    def _places(self) -> tuple[int, ...]:
        """Where each head of the model is in the order of the placement."""
        places = {head: place for place, head in enumerate(self.order)}
        return tuple(places[head] for head in range(len(places)))


@cache
def _runs(places: tuple[int, ...], sizes: tuple[int, ...]) -> list[tuple[int, int, int]]:
    """The model's heads in order as runs of neighbours: the number of a part, the first of its heads, and how many.

    Args:
        places: where each head is in the order of the placement.
        sizes: how many heads each part has, in the order of the placement.
    """
    within = [(number, first) for number, size in enumerate(sizes) for first in range(size)]
    runs: list[tuple[int, int, int]] = []
    for number, first in (within[place] for place in places):
        if runs and runs[-1][0] == number and sum(runs[-1][1:]) == first:
            runs[-1] = (*runs[-1][:2], runs[-1][2] + 1)
        else:
            runs.append((number, first, 1))
    return runs
