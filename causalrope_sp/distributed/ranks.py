"""Some ranks that settle things together before a stream: all of a group, or those that denoise."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from causalrope_sp import errors
from causalrope_sp.distributed.communicator import Communicator
from causalrope_sp.errors import CausalRopeError, ConfigError

T = TypeVar("T")


class Ranks:
    """
    Args:
        numbers: of the ranks within the group, in order.
        rank: which of them this one is.
        exchange: among them; asked for if there is more than one.
    """

    def __init__(
        self, numbers: Sequence[int], rank: int, communicator: Callable[[Sequence[int]], Communicator]
    ) -> None:
        self._numbers, self._make_communicator = numbers, communicator
        self.rank, self.size = rank, len(numbers)

    @property
    def _communicator(self) -> Communicator:
        return self._make_communicator(self._numbers)

    def run_collectively(self, work: Callable[[], T]) -> T:
        """What `work` returns on this rank. Every rank must call, and what `work` exchanges must be among ranks that
        all raise, or none of them.

        Raises:
            CausalRopeError: on every rank, so that none goes on to wait for the others, what `work` raised as wrong
                input on the first rank that met any.
        """
        if self.size == 1:
            return work()
        error: CausalRopeError | None = None
        try:
            made = work()
        except CausalRopeError as wrong:
            error = wrong
        said = self._communicator.everyone({} if error is None else {"kind": type(error).__name__, "said": str(error)})
        failed = next((one for one in said if one), None)
        if failed is None:
            return made
        if error is not None and failed["said"] == str(error):
            raise error
        raise getattr(errors, failed["kind"], CausalRopeError)(failed["said"])

    def agree(self, on: Mapping[str, object]) -> None:
        """Makes sure that all are about to do the same; what each field says is compared as text.

        Raises:
            ConfigError: a field that differs; the message names it and the ranks.
        """
        if self.size == 1:
            return
        said = self._communicator.everyone({name: str(value) for name, value in on.items()})
        for name in on:
            ranks_by_value: dict[str | None, list[str]] = {}
            for rank, fields in zip(self._numbers, said, strict=True):
                ranks_by_value.setdefault(fields.get(name), []).append(str(rank))
            if len(ranks_by_value) > 1:
                sides = "; ".join(f"{value} on {', '.join(ranks)}" for value, ranks in ranks_by_value.items())
                raise ConfigError(f"ranks differ in {name}: {sides}")

    def first_says(self, mine: str) -> str:
        """What the first has to say, on every rank."""
        return mine if self.size == 1 else self._communicator.everyone({"said": mine})[0]["said"]

    def broadcast(self, kind: str, room: Tensor, source: int) -> Tensor:
        """Fills `room` on every rank with what it holds on the rank `source` of them."""
        return room if self.size == 1 else self._communicator.broadcast(kind, room, source)

    def from_first(
        self, kind: str, make: Callable[[], Tensor], shape: Sequence[int], dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """What the first makes, of a shape that all know, on every rank; the others do not call `make`.

        Raises:
            CausalRopeError: on every rank, what `make` raised on the first.
        """
        if self.size == 1:
            return make().to(device, dtype)
        room = torch.empty(*shape, dtype=dtype, device=device)
        self.run_collectively(lambda: room.copy_(make()) if self.rank == 0 else None)
        return self.broadcast(kind, room, 0)
