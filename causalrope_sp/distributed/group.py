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
from causalrope_sp.distributed.comm_stats import LAYERLESS, CommStats
from causalrope_sp.distributed.communicator import Communicator
from causalrope_sp.distributed.halo import SpatialShards
from causalrope_sp.distributed.layout import AUTO, Layout, parse_strategy
from causalrope_sp.distributed.loading_watch import LoadingWatch
from causalrope_sp.distributed.mesh import Mesh
from causalrope_sp.distributed.ranks import Ranks
from causalrope_sp.distributed.termination import name_lost_rank_on_sigterm
from causalrope_sp.distributed.watchdog import Watchdog, leave
from causalrope_sp.errors import ConfigError
from causalrope_sp.grid import LatentGrid, Shard
from causalrope_sp.siblings import Siblings, end_with_launcher

LONGEST_S = 1e6  # a timeout


class SequenceParallel:
    """Which rank this is, of how many, and how it reaches the others.

    It is built by `single()`, by `from_env()` or, around a process group that exists already, by the constructor. It
    knows which attention strategy was asked for and nothing of what a strategy costs: see `planning.strategy`.

    Args:
        group: the process group of the ranks, or None for one process.
        strategy: one of `STRATEGIES`, a product such as ulysses4xgather-kv2, or "auto" (see `layout`).
        device: where this rank computes.
        cfg: the size of the mesh axis `cfg`: 2 runs the two branches of guidance at once.
        chunk: the size of the mesh axis `chunk`, for chunks that are denoised in parallel.
        decode_ranks: how many of the last ranks only decode.
        overlap: compute while keys, values and queries are in flight. The result is the same either way.
        head_groups: send the output of one group of heads while the next is computed (`ulysses` alone).
        attention: the attention library, one of `causalrope_kernels.ATTENTION_BACKENDS`; "auto" measures them.
        timeout: the timeout of the process groups that are made within `group`.

    Raises:
        ConfigError: an unknown strategy or attention library, a product for another number of ranks, or axes that do
            not divide the ranks.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        strategy: str = AUTO,
        device: torch.device | str = "cpu",
        *,
        cfg: int = 1,
        chunk: int = 1,
        decode_ranks: int = 0,
        overlap: bool = True,
        head_groups: int = 1,
        attention: str = "auto",
        timeout: timedelta = default_pg_timeout,
    ) -> None:
        self._group = group
        self.device = torch.device(device)
        self.rank = 0 if group is None else group.rank()
        self.size = 1 if group is None else group.size()
        self.mesh = Mesh(self.size, cfg, chunk, decode_ranks)
        self.decodes = self.rank in self.mesh.decoding
        coordinates = (0, 0, 0) if self.decodes else self.mesh.coordinates(self.rank)
        self.cfg_rank, self.chunk_rank, self.sp_rank = coordinates
        if strategy != AUTO:
            parse_strategy(strategy, self.mesh.sp)
        if head_groups < 1:
            raise ConfigError(f"head_groups must be at least 1, not {head_groups}")
        if attention not in ATTENTION_BACKENDS:
            raise ConfigError(f"attention must be one of {', '.join(ATTENTION_BACKENDS)}, not {attention!r}")
        obstacle = attention_obstacle(attention, self.device)
        if obstacle is not None:
            raise ConfigError(f"attention {attention} {obstacle}")
        self.strategy, self.overlap, self.head_groups, self.attention = strategy, overlap, head_groups, attention
        self.comm_stats = CommStats()
        self.communicators: dict[tuple[str | None, tuple[int, ...]], Communicator] = {}
        self._watchdog: Watchdog | None = None
        self._silence_s, self._timeout = 0.0, timeout
        self._owns_group = False
        self.everyone = Ranks(range(self.size), self.rank, self._communicator)
        self.denoisers = Ranks(self.mesh.denoising, self.rank, self._communicator)
        if decode_ranks:  # between all ranks, for tensors on the host
            self.host_communicator = self._communicator(range(self.size), backend="gloo")

    @classmethod
    def single(cls, strategy: str = AUTO, device: torch.device | str | None = None, **options: Any) -> SequenceParallel:
        """One process, through the same code; `options` are the constructor's."""
        return cls(None, strategy, device or default_device(), **options)

    @classmethod
    def from_env(
        cls,
        strategy: str = AUTO,
        device: torch.device | str | None = None,
        *,
        timeout_s: float = 600,
        silence_s: float = 20,
        on_loss: Callable[[str], None] = leave,
        siblings: Siblings | None = None,
        **options: Any,
    ) -> SequenceParallel:
        """The group that torchrun's environment describes (NCCL on CUDA, gloo on the CPU), or one process without it.

        Args:
            timeout_s: how long a rank may hold up the others before it counts as stuck.
            silence_s: how long a rank may give no sign of life before it counts as lost.
            on_loss: what to do then, called from another thread with a line that names the rank; ends the process if
                not given.
            siblings: the other ranks of this machine, where the caller asks of them too.
            options: the constructor's.

        Raises:
            ConfigError: an unknown strategy, a time that is not above 0, or fewer GPUs on this machine than ranks.
        """
        for seconds in (timeout_s, silence_s):
            if not 0 < seconds <= LONGEST_S:
                raise ConfigError(f"a timeout must be above 0 and at most {LONGEST_S:g} seconds, not {seconds:g}")
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return cls(None, strategy, device or default_device(), **options)
        own = torch.device(device or default_device())
        if own.type == "cuda":
            local = int(os.environ["LOCAL_RANK"]) if own.index is None else own.index
            if local >= torch.cuda.device_count():
                raise ConfigError(f"local rank {local} has no GPU: this machine has {torch.cuda.device_count()}")
            own = torch.device("cuda", local)
            torch.cuda.set_device(own)
        world = int(os.environ["WORLD_SIZE"])
        mesh = Mesh(world, options.get("cfg", 1), options.get("chunk", 1), options.get("decode_ranks", 0))
        if strategy != AUTO:
            parse_strategy(strategy, mesh.sp)  # wrong input is said before any rank waits for another
        siblings = siblings or Siblings()
        end_with_launcher()
        if on_loss is leave:
            name_lost_rank_on_sigterm(siblings)
        loading = LoadingWatch(siblings, on_loss)
        limit = timedelta(seconds=timeout_s + 2 * silence_s)  # the watchdog speaks first, and names the rank
        dist.init_process_group("nccl" if own.type == "cuda" else "gloo", timeout=limit)
        assert dist.group.WORLD is not None
        parallel = cls(dist.group.WORLD, strategy, own, timeout=limit, **options)
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
            store,
            parallel.rank,
            parallel.size,
            lambda: parallel.comm_stats.begun,
            peers,
            on_loss,
            silence_s,
            timeout_s,
            siblings,
        )
        loading.stop()
        return parallel

    def moved_to(self, device: torch.device) -> SequenceParallel:
        """The group of one process, with the same options, on another device."""
        assert self.size == 1, "the devices of several ranks are their group's"
        options: dict[str, Any] = {name: getattr(self, name) for name in ("overlap", "head_groups", "attention")}
        return SequenceParallel(self._group, self.strategy, device, **options)

    def check(self, grid: LatentGrid, heads: int) -> None:
        """Refuses, before any stream, what no stream could run.

        Raises:
            ConfigError: more ranks than tokens in a frame, or fewer heads than ranks that trade tokens for heads.
        """
        Shard(grid, 0, self.mesh.sp)
        if self.strategy != AUTO:
            parse_strategy(self.strategy, self.mesh.sp).check(heads)

    def label(self, layout: Layout) -> str:
        """The name of a layout on this mesh, such as 2×ulysses where two branches of guidance run at once."""
        outer = self.mesh.cfg * self.mesh.chunk
        return layout.name if outer == 1 else f"{outer}×{layout.name}"

    def shard(self, grid: LatentGrid) -> Shard:
        """The tokens of every frame that this rank owns.

        Raises:
            ConfigError: more ranks than tokens in a frame, or this is a decode rank, which owns none.
        """
        if self.decodes:
            raise ConfigError(f"rank {self.rank} only decodes: it runs a pipeline's streams, and none of its own")
        return Shard(grid, self.sp_rank, self.mesh.sp)

    def gather_tokens(self, tokens_BFSE: Tensor, grid: LatentGrid) -> Tensor:
        """All tokens of the frames, on every rank of the `sp` axis, from each rank's own."""
        if self.mesh.sp == 1:
            return tokens_BFSE
        sizes = [shard.tokens for shard in self.shard(grid).all]
        return self.sp_communicator().gather_tokens(tokens_BFSE, sizes)

    def all_gather_cfg(self, kind: str, mine: Tensor) -> list[Tensor]:
        """What the ranks along the `cfg` axis hold, tensors of one shape, in order; valid until the next call."""
        communicator = self._communicator(self.mesh.cfg_group(self.rank))
        return communicator.all_gather(kind, LAYERLESS, [mine.shape] * self.mesh.cfg, mine.contiguous()).wait()

    def spatial_shards(self, grid: LatentGrid, ranks: Sequence[int]) -> SpatialShards | None:
        """The strips of a picture that some ranks decode together, this one among them; None where it is alone.

        Raises:
            ConfigError: more ranks than the picture's longer side has latent pixels.
        """
        return (
            None if len(ranks) == 1 else SpatialShards(self._communicator(ranks), grid.latent_height, grid.latent_width)
        )

    def sp_communicator(self) -> Communicator:
        """The communicator of the `sp` axis; every rank of it must ask, and there must be several."""
        return self._communicator(self.mesh.sp_group(self.rank))

    def communicator_among(self, ranks: Sequence[int]) -> Communicator | None:
        """The communicator of some ranks, this one included, or None where it is alone. All of them must ask."""
        return self._communicator(ranks) if len(ranks) > 1 else None

    def _communicator(self, ranks: Sequence[int], backend: str | None = None) -> Communicator:
        """The exchange among some ranks of the group, made once; with the group's own backend if none is named.

        torch tells a new group by its ranks and by how many groups each of them has: all of them must have made as
        many before.
        """
        assert self._group is not None, "one process exchanges nothing"
        key = backend, tuple(ranks)
        if key not in self.communicators:
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
            self.communicators[key] = Communicator(group, self.comm_stats, self._who_is_gone)
        return self.communicators[key]

    def _who_is_gone(self) -> str | None:
        return None if self._watchdog is None else self._watchdog.who_is_silent(self._silence_s)

    def close(self) -> None:
        """Ends what `from_env` started: the watchdog and the process group."""
        if self._watchdog is not None:
            self._watchdog.stop()
        if self._owns_group and dist.is_initialized():
            dist.destroy_process_group()


def default_device() -> str:
    """ "cuda" if this machine has a CUDA device, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"
