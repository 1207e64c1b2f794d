"""The group of ranks that share one stream."""

from __future__ import annotations

import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from causalrope_sp.errors import ConfigError
from causalrope_sp.grid import LatentGrid, Shard
from causalrope_sp.parallel.exchange import all_gather
from causalrope_sp.parallel.gather_kv import GatherKV
from causalrope_sp.parallel.strategy import Strategy
from causalrope_sp.parallel.ulysses import Ulysses

_STRATEGIES = {Ulysses.name: Ulysses, GatherKV.name: GatherKV}
STRATEGIES = tuple(_STRATEGIES)


class SequenceParallel:
    """Which rank this is, of how many, and how attention crosses between them.

    Built by `single()`, `from_env()` or, around a process group that exists already, by the constructor.

    Args:
        group: the process group of the ranks, or None for one process.
        strategy: one of `STRATEGIES`, or "auto" (ulysses where it is balanced, else gather-kv).
        device: where this rank computes.

    Raises:
        ConfigError: an unknown strategy.
    """

    def __init__(
        self, group: dist.ProcessGroup | None, strategy: str = "auto", device: torch.device | str = "cpu"
    ) -> None:
        _check_name(strategy)
        self._group, self._requested = group, strategy
        self.device = torch.device(device)
        self.rank = 0 if group is None else group.rank()
        self.size = 1 if group is None else group.size()
        self._owns_group = False

    @classmethod
    def single(cls, strategy: str = "auto", device: torch.device | str | None = None) -> SequenceParallel:
        """One process, through the same code."""
        return cls(None, strategy, device or ("cuda" if torch.cuda.is_available() else "cpu"))

    @classmethod
    def from_env(
        cls, strategy: str = "auto", device: torch.device | str | None = None, timeout_s: float = 600
    ) -> SequenceParallel:
        """The group that torchrun's environment describes (NCCL on CUDA, gloo on the CPU), or one process without it.

        Raises:
            ConfigError: an unknown strategy, or fewer GPUs on this machine than ranks.
        """
        _check_name(strategy)
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return cls.single(strategy, device)
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if place.type == "cuda":
            local = int(os.environ["LOCAL_RANK"]) if place.index is None else place.index
            if local >= torch.cuda.device_count():
                raise ConfigError(f"local rank {local} has no GPU: this machine has {torch.cuda.device_count()}")
            place = torch.device("cuda", local)
            torch.cuda.set_device(place)
        dist.init_process_group("nccl" if place.type == "cuda" else "gloo", timeout=timedelta(seconds=timeout_s))
        parallel = cls(dist.group.WORLD, strategy, place)
        parallel._owns_group = True
        return parallel

    def strategy_name(self, heads: int) -> str:
        """The strategy in use for a model of this many heads."""
        if self.size == 1:
            return Strategy.name
        if self._requested == "auto":
            return Ulysses.name if heads % self.size == 0 else GatherKV.name
        return self._requested

    def strategy(self, grid: LatentGrid, heads: int) -> Strategy:
        """This rank's way through self-attention.

        Raises:
            ConfigError: more ranks than tokens in a frame, or a strategy that these heads cannot be split for.
        """
        shard = self.shard(grid)
        if self._group is None or self.size == 1:
            return Strategy(shard, heads)
        return _STRATEGIES[self.strategy_name(heads)](shard, heads, self._group)

    def shard(self, grid: LatentGrid) -> Shard:
        """The tokens of every frame that this rank owns."""
        return Shard(grid, self.rank, self.size)

    def gather_tokens(self, tokens_BFSE: Tensor, shard: Shard) -> Tensor:
        """All tokens of the frames, on every rank, from each rank's own."""
        if self._group is None:
            return tokens_BFSE
        return torch.cat(all_gather(tokens_BFSE, [s.tokens for s in shard.all], 2, self._group), 2)

    def close(self) -> None:
        """Ends the process group if `from_env` made it."""
        if self._owns_group and dist.is_initialized():
            dist.destroy_process_group()


def _check_name(strategy: str) -> None:
    if strategy not in ("auto", *STRATEGIES):
        raise ConfigError(f"unknown strategy {strategy!r}; there are: auto, {', '.join(STRATEGIES)}")
