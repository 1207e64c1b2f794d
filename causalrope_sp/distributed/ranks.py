"""What ranks do collectively before a stream: raise the same error, compare options, share tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from causalrope_sp import errors
from causalrope_sp.distributed.communicator import Communicator
from causalrope_sp.distributed.notices import raised
from causalrope_sp.errors import CausalRopeError, ConfigError, RankLostError

T = TypeVar("T")


def _described(error: Exception) -> dict[str, str]:
    """The message of an error, its kind if it is one of the library's own, and the rank that another call has named."""
    ours = isinstance(error, CausalRopeError)
    own = str(error) if ours else raised(error), ""
    message, rank = (error.of_rank or own) if isinstance(error, CausalRopeError | RankLostError) else own
    return {**({"kind": type(error).__name__} if ours else {}), "message": message, "rank": rank}


class Ranks:
    """Some ranks of a group, such as all of them or those that denoise.

    Args:
        numbers: the numbers of these ranks in the group, in order.
        rank: which of them this rank is.
        communicator: returns the communicator of ranks by their numbers; it is called if there are several.
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
        """Calls a function on every rank and raises the error of one rank on all of them.

        Every rank must call this. `work` may use collectives among ranks that either all raise or all return.

        Args:
            work: what this rank does.

        Returns:
            What `work` returned on this rank.

        Raises:
            CausalRopeError: `work` raised it on some rank. Every rank raises the error of the first such rank, so that
                none waits for another.
            RankLostError: `work` raised another error on another rank, which raises that one.
        """
        if self.size == 1:
            return work()
        error: Exception | None = None
        try:
            result = work()
        except Exception as caught:
            if isinstance(caught, RankLostError) and caught.of_rank is None:
                raise  # no collective can follow
            error = caught
        own = {} if error is None else _described(error)
        by_rank = self._communicator.everyone(own)
        first = next((rank for rank, fields in enumerate(by_rank) if fields), None)
        if first is None:
            return result
        told = by_rank[first]
        alike = (told.get("kind"), told["message"]) == (own.get("kind"), own.get("message"))
        if error is not None and (alike or not isinstance(error, CausalRopeError)):
            raise error
        message, number = told["message"], told.get("rank") or str(self._numbers[first])
        again: CausalRopeError | RankLostError = RankLostError(f"rank {number} {message}")
        if "kind" in told:
            again = getattr(errors, told["kind"], CausalRopeError)(f"{message} (on rank {number})")
        again.of_rank = (
            message,
            number,
        )  # a call around this one, which raises it once more, does not name the rank again
        raise again

    def agree(self, on: Mapping[str, object]) -> None:
        """Checks that all ranks have the same options.

        Args:
            on: the options by name; their values are compared as text.

        Raises:
            ConfigError: an option differs; the message names it, its values and the ranks.
        """
        if self.size == 1:
            return
        by_rank = self._communicator.everyone({name: str(value) for name, value in on.items()})
        for name in on:
            ranks_by_value: dict[str | None, list[str]] = {}
            for rank, fields in zip(self._numbers, by_rank, strict=True):
                ranks_by_value.setdefault(fields.get(name), []).append(str(rank))
            if len(ranks_by_value) > 1:
                sides = "; ".join(f"{value} on {', '.join(ranks)}" for value, ranks in ranks_by_value.items())
                raise ConfigError(f"ranks differ in {name}: {sides}")

    def all_say(self, flag: bool) -> bool:
        """Returns on every rank whether `flag` is true on all of them."""
        return (
            flag if self.size == 1 else all(said["flag"] for said in self._communicator.everyone({"flag": "x" * flag}))
        )

    def first_says(self, text: str) -> str:
        """Returns the `text` of the first rank on every rank."""
        return text if self.size == 1 else self._communicator.everyone({"text": text})[0]["text"]

    def broadcast(self, kind: str, tensor: Tensor, source: int) -> Tensor:
        """Broadcasts a tensor from the rank `source` of these ranks; see `Communicator.broadcast`."""
        return tensor if self.size == 1 else self._communicator.broadcast(kind, tensor, source)

    def from_first(
        self, kind: str, make: Callable[[], Tensor], shape: Sequence[int], dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """Makes a tensor on the first rank and broadcasts it.

        Args:
            kind: the kind of the collective, for `CommStats`.
            make: makes the tensor; only the first rank calls it.
            shape: the shape of the tensor.
            dtype: the dtype of the result.
            device: where the result lives.

        Returns:
            The tensor of the first rank, on every rank.

        Raises:
            CausalRopeError: `make` raised it on the first rank; every rank raises it.
        """
        if self.size == 1:
            return make().to(device, dtype)
        tensor = torch.empty(*shape, dtype=dtype, device=device)
        self.run_collectively(lambda: tensor.copy_(make()) if self.rank == 0 else None)
        return self.broadcast(kind, tensor, 0)
