"""The group of ranks that share one stream."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.constants import default_pg_timeout

from causalrope_kernels import ATTENTION_BACKENDS, attention_obstacle
from causalrope_sp.attention.base import Strategy
from causalrope_sp.attention.gather_kv import GatherKV
from causalrope_sp.attention.shard_kv import ShardKV
from causalrope_sp.attention.ulysses import Ulysses
from causalrope_sp.config import DiTConfig
from causalrope_sp.distributed.comm_stats import LAYERLESS, Ledger
from causalrope_sp.distributed.communicator import Exchange
from causalrope_sp.distributed.halo import Strips
from causalrope_sp.distributed.layout import Layout, parse_strategy
from causalrope_sp.distributed.mesh import Mesh
from causalrope_sp.distributed.ranks import Ranks
from causalrope_sp.distributed.watchdog import Watchdog, leave
from causalrope_sp.errors import ConfigError
from causalrope_sp.grid import LatentGrid, Shard
from causalrope_sp.planning.cost import plan
from causalrope_sp.planning.machines import CPU, H100, Machine
from causalrope_sp.planning.workload import Workload

LONGEST_S = 1e6  # a timeout


class SequenceParallel:
    """Which rank this is, of how many, and how attention crosses between them.

    Built by `single()`, `from_env()` or, around a process group that exists already, by the constructor.

    Args:
        group: the process group of the ranks, or None for one process.
        lanes: in how many lanes of equal size the ranks denoise (see `mesh`).
        decoders: how many of the last ranks only decode.
        strategy: one of `STRATEGIES`, a product such as ulysses4xgather-kv2, or "auto" (see `layout`).
        device: where this rank computes.
        overlap: compute while keys, values and queries are in flight. Exact either way.
        head_groups: send the output of one group of heads while the next is computed (`ulysses` alone).
        attention: which library attends, one of `causalrope_kernels.ATTENTION_BACKENDS`; "auto" measures.
        timeout: of the groups that are made within `group`.
        machine: what "auto" predicts with, the same on every rank; if None, an H100 on NVLink, or a CPU.

    Raises:
        ConfigError: an unknown strategy or attention, a product for another number of ranks, or no such mesh.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        strategy: str = "auto",
        device: torch.device | str = "cpu",
        *,
        lanes: int = 1,
        decoders: int = 0,
        overlap: bool = True,
        head_groups: int = 1,
        attention: str = "auto",
        timeout: timedelta = default_pg_timeout,
        machine: Machine | None = None,
    ) -> None:
        self._group = group
        self.device = torch.device(device)
        self.machine = machine or (H100 if self.device.type == "cuda" else CPU)
        self.rank = 0 if group is None else group.rank()
        self.size = 1 if group is None else group.size()
        self.mesh = Mesh(self.size, lanes, decoders)
        self.decodes = self.rank in self.mesh.decoding
        self.lane, self.place = (0, 0) if self.decodes else self.mesh.place(self.rank)
        self._layout = None if strategy == "auto" else parse_strategy(strategy, self.mesh.sequence)
        self._chosen: dict[DiTConfig, Layout] = {}
        if head_groups < 1:
            raise ConfigError(f"head_groups must be at least 1, not {head_groups}")
        if attention not in ATTENTION_BACKENDS:
            raise ConfigError(f"attention must be one of {', '.join(ATTENTION_BACKENDS)}, not {attention!r}")
        obstacle = attention_obstacle(attention, self.device)
        if obstacle is not None:
            raise ConfigError(f"attention {attention} {obstacle}")
        self._overlap, self._head_groups, self._attention = overlap, head_groups, attention
        self.ledger = Ledger()
        self._exchanges: dict[tuple[str | None, tuple[int, ...]], Exchange] = {}
        self._watchdog: Watchdog | None = None
        self._silence_s, self._timeout = 0.0, timeout
        self._owns_group = False
        self.everyone = Ranks(range(self.size), self.rank, self._exchange)
        self.denoisers = Ranks(self.mesh.denoising, self.rank, self._exchange)
        if decoders:
            self.host_exchange = self._exchange(range(self.size), backend="gloo")  # of all, for tensors on the host

    @classmethod
    def single(
        cls, strategy: str = "auto", device: torch.device | str | None = None, **options: Any
    ) -> SequenceParallel:
        """One process, through the same code; `options` are the constructor's."""
        return cls(None, strategy, device or _default_device(), **options)

    @classmethod
    def from_env(
        cls,
        strategy: str = "auto",
        device: torch.device | str | None = None,
        *,
        timeout_s: float = 600,
        silence_s: float = 20,
        on_loss: Callable[[str], None] = leave,
        **options: Any,
    ) -> SequenceParallel:
        """The group that torchrun's environment describes (NCCL on CUDA, gloo on the CPU), or one process without it.

        Args:
            timeout_s: how long a rank may hold up the others before it counts as stuck.
            silence_s: how long a rank may give no sign of life before it counts as lost.
            on_loss: what to do then, called from another thread with a line that names the rank; ends the process if
                not given.
            options: the constructor's.

        Raises:
            ConfigError: an unknown strategy, a time that is not above 0, or fewer GPUs on this machine than ranks.
        """
        for seconds in (timeout_s, silence_s):
            if not 0 < seconds <= LONGEST_S:
                raise ConfigError(f"a timeout must be above 0 and at most {LONGEST_S:g} seconds, not {seconds:g}")
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return cls(None, strategy, device or _default_device(), **options)
        place = torch.device(device or _default_device())
        if place.type == "cuda":
            local = int(os.environ["LOCAL_RANK"]) if place.index is None else place.index
            if local >= torch.cuda.device_count():
                raise ConfigError(f"local rank {local} has no GPU: this machine has {torch.cuda.device_count()}")
            place = torch.device("cuda", local)
            torch.cuda.set_device(place)
        mesh = Mesh(int(os.environ["WORLD_SIZE"]), options.get("lanes", 1), options.get("decoders", 0))
        if strategy != "auto":
            parse_strategy(strategy, mesh.sequence)  # wrong input is said before anybody waits
        limit = timedelta(seconds=timeout_s + 2 * silence_s)  # the watchdog speaks first, and names the rank
        dist.init_process_group("nccl" if place.type == "cuda" else "gloo", timeout=limit)
        assert dist.group.WORLD is not None
        parallel = cls(dist.group.WORLD, strategy, place, timeout=limit, **options)
        parallel._owns_group, parallel._silence_s = True, silence_s
        # a client of its own, since a blocking call on one connection holds up every other
        store = dist.TCPStore(  # type: ignore[attr-defined]
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            timeout=timedelta(seconds=silence_s),
        )
        peers = parallel.mesh.decoding if parallel.decodes else parallel.mesh.denoising
        parallel._watchdog = Watchdog(
            store, parallel.rank, parallel.size, lambda: parallel.ledger.begun, peers, on_loss, silence_s, timeout_s
        )
        return parallel

    @property
    def named(self) -> str:
        """The strategy as it was asked for, "auto" included."""
        return "auto" if self._layout is None else self._layout.name

    def settle(self, config: DiTConfig, strategy: str) -> None:
        """What "auto" takes for the streams of a model, where more is known of the run than a stream's sizes."""
        self._chosen[config] = parse_strategy(strategy, self.mesh.sequence)

    def layout(self, work: Workload) -> Layout:
        """The strategy in use for a stream; "auto" takes what was settled, or what the cost model predicts to be the
        fastest for the first stream of a model, and keeps to it.

        Raises:
            ConfigError: more ranks than tokens in a frame, or fewer heads than ranks that trade tokens for heads.
        """
        self.shard(work.grid)
        layout = self._layout or self._chosen.get(work.config)
        if layout is None:
            lanes = self.mesh.lanes
            costs = plan(work, lanes * self.mesh.sequence, self.machine, lanes=[lanes])
            best = next(cost for cost in costs if cost.chosen)
            layout = self._chosen[work.config] = parse_strategy(best.strategy, self.mesh.sequence)
        layout.check(work.config.num_heads)
        return layout

    def check(self, grid: LatentGrid, heads: int) -> None:
        """Refuses, before any stream, what no stream could run.

        Raises:
            ConfigError: more ranks than tokens in a frame, or fewer heads than ranks that trade tokens for heads.
        """
        Shard(grid, 0, self.mesh.sequence)
        if self._layout is not None:
            self._layout.check(heads)

    def in_use(self, config: DiTConfig) -> str:
        """The name of the strategy that the streams of a model use; "auto" before the first of them."""
        layout = self._layout or self._chosen.get(config)
        return "auto" if layout is None else self._label(layout)

    def describe(self, work: Workload) -> str:
        """All that decides which collectives a stream makes, in words: the same on every rank, or they would hang."""
        layout = self.layout(work)
        return f"{self._label(layout)}, {self._groups_of(layout, work.config.num_heads)} head groups"

    def _label(self, layout: Layout) -> str:
        return layout.name if self.mesh.lanes == 1 else f"{self.mesh.lanes}×{layout.name}"

    def strategy(self, work: Workload) -> Strategy:
        """This rank's way through self-attention. Every rank must ask for it, since groups are made here.

        Raises:
            ConfigError: more ranks than tokens in a frame, or fewer heads than ranks that trade tokens for heads.
        """
        layout, grid, heads = self.layout(work), work.grid, work.config.num_heads
        if self.mesh.sequence == 1:
            return Strategy(grid.tokens, heads, self._attention)
        tokens = [shard.tokens for shard in self.shard(grid).all]
        row, column = layout.place(self.place)
        rows = layout.rows(tokens)
        split = layout.heads(heads)
        mine = split[column]
        inner = Strategy(sum(rows[row]), mine, self._attention)
        if layout.inner is not None:
            share = {GatherKV.name: GatherKV, ShardKV.name: ShardKV}[layout.inner]
            exchange = self._exchange(self._lane[column :: layout.ulysses])
            inner = share(exchange, [sum(t) for t in rows], mine, self._overlap, self._attention)
        if layout.ulysses == 1:
            return inner
        trading = self._exchange(self._lane[row * layout.ulysses : (row + 1) * layout.ulysses])
        return Ulysses(trading, rows[row], split, inner, self._groups_of(layout, heads))

    def _groups_of(self, layout: Layout, heads: int) -> int:
        """A rank cannot send its output in more groups than it has heads, and only ulysses alone sends in groups."""
        return 1 if layout.inner else min(self._head_groups, min(layout.heads(heads)))

    def shard(self, grid: LatentGrid) -> Shard:
        """The tokens of every frame that this rank owns.

        Raises:
            ConfigError: more ranks than tokens in a frame, or this is a decode rank, which owns none.
        """
        if self.decodes:
            raise ConfigError(f"rank {self.rank} only decodes: it runs a pipeline's streams, and none of its own")
        return Shard(grid, self.place, self.mesh.sequence)

    def gather_tokens(self, tokens_BFSE: Tensor, grid: LatentGrid) -> Tensor:
        """All tokens of the frames, on every rank of the lane, from each rank's own."""
        if self.mesh.sequence == 1:
            return tokens_BFSE
        sizes = [shard.tokens for shard in self.shard(grid).all]
        return self._exchange(self._lane).gather_tokens(tokens_BFSE, sizes)

    def across_lanes(self, kind: str, mine: Tensor) -> list[Tensor]:
        """What the ranks at this place of every lane hold of the same shape, in order of lane; until the next call."""
        exchange = self._exchange(self.mesh.across(self.place))
        return exchange.all_gather(kind, LAYERLESS, [mine.shape] * self.mesh.lanes, mine.contiguous()).wait()

    def strips(self, grid: LatentGrid, ranks: Sequence[int]) -> Strips | None:
        """The strips of a picture that some ranks decode together, this one among them; None where it is alone.

        Raises:
            ConfigError: more ranks than the picture's longer side has latent pixels.
        """
        return None if len(ranks) == 1 else Strips(self._exchange(ranks), grid.latent_height, grid.latent_width)

    def exchange(self) -> Exchange:
        """What this rank's lane talks through; every rank of it must ask, and there must be several."""
        return self._exchange(self._lane)

    @property
    def attention(self) -> str:
        """Which library attends."""
        return self._attention

    def among(self, ranks: Sequence[int]) -> Exchange | None:
        """The exchange among some ranks, this one included, or None where it is alone. All of them must ask."""
        return self._exchange(ranks) if len(ranks) > 1 else None

    @property
    def _lane(self) -> range:
        return self.mesh.lane(self.lane)

    def _exchange(self, ranks: Sequence[int], backend: str | None = None) -> Exchange:
        """The exchange among some ranks of the group, made once; with the group's own backend if none is named.

        torch tells a new group by its ranks and by how many groups each of them has: all of them must have made as
        many before.
        """
        assert self._group is not None, "one process exchanges nothing"
        key = backend, tuple(ranks)
        if key not in self._exchanges:
            group = self._group
            if len(ranks) < self.size or backend is not None:
                every = dist.get_process_group_ranks(self._group)
                made = dist.new_group(
                    [every[rank] for rank in ranks],
                    timeout=self._timeout,
                    backend=backend,
                    use_local_synchronization=True,
                )
                assert isinstance(made, dist.ProcessGroup)
                group = made
            self._exchanges[key] = Exchange(group, self.ledger, self._who_is_gone)
        return self._exchanges[key]

    def _who_is_gone(self) -> str | None:
        return None if self._watchdog is None else self._watchdog.who_is_silent(self._silence_s)

    def close(self) -> None:
        """Ends what `from_env` started: the watchdog and the process group."""
        if self._watchdog is not None:
            self._watchdog.stop()
        if self._owns_group and dist.is_initialized():
            dist.destroy_process_group()


def _default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
