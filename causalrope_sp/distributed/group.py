"""The group of ranks that share one stream: this rank's coordinates on the mesh, and its communicators.

Shapes: B batch, F frames, S tokens of a frame on this rank, E numbers in a token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from datetime import timedelta
from numbers import Real
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.constants import default_pg_timeout

from causalrope_kernels import ATTENTION_BACKENDS, attention_obstacle
from causalrope_sp.checks import check_choice, check_flag, check_text, check_whole, shown
from causalrope_sp.devices import default_device, device_of_rank, own_device
from causalrope_sp.distributed.backends import check_backend, check_own_gpu
from causalrope_sp.distributed.comm_stats import LAYERLESS, CommStats
from causalrope_sp.distributed.communicator import Communicator
from causalrope_sp.distributed.halo import SpatialShards
from causalrope_sp.distributed.layout import AUTO, Layout, check_head_groups, parse_strategy
from causalrope_sp.distributed.membership import Membership
from causalrope_sp.distributed.mesh import Mesh
from causalrope_sp.distributed.notices import NoticeBoard
from causalrope_sp.distributed.ranks import Ranks
from causalrope_sp.distributed.stream_turns import StreamTurns
from causalrope_sp.distributed.subgroup import subgroup
from causalrope_sp.distributed.turns import Turns
from causalrope_sp.distributed.watchdog import leave
from causalrope_sp.errors import ConfigError
from causalrope_sp.grid import LatentGrid, Shard
from causalrope_sp.rank_environment import RankEnvironment
from causalrope_sp.siblings import Siblings

LONGEST_S = 1e6  # the longest timeout, in seconds


class SequenceParallel:
    """The ranks of a stream, as one rank sees them.

    `single()` and `from_env()` build it; the constructor builds it around an existing process group. It holds the name
    of the attention strategy and knows nothing of the costs of strategies: see `planning.strategy`.

    Args:
        group: the process group of the ranks, or None for one process.
        strategy: one of `STRATEGIES`, a product such as ulysses4xgather-kv2, or "auto" (see `layout`).
        device: where this rank computes; "cuda" is the current GPU. Ranks on GPUs need NCCL, and a GPU each.
        cfg: the size of the mesh axis `cfg`: 2 runs the conditional and the unconditional branch of guidance at once.
        chunk: the size of the mesh axis `chunk`, for chunks that are denoised in parallel.
        decode_ranks: how many of the last ranks only decode.
        overlap: compute while keys, values and queries are in flight. The result is the same either way.
        head_groups: send the output of one group of heads while the next is computed (`ulysses` alone).
        attention: the attention backend, one of `causalrope_kernels.ATTENTION_BACKENDS`; "auto" measures them.
        timeout: the timeout of the process groups that are made within `group`.
        membership: what watches this rank and closes the group; None for a group that its maker watches and closes.

    Attributes:
        rank: this rank's number in the group.
        size: how many ranks the group has.
        mesh: the axes of the group.
        sp_rank: this rank's number along the `sp` axis; `cfg_rank` and `chunk_rank` likewise.
        decodes: whether this rank only decodes.
        comm_stats: counts the collectives of this rank.
        turns: the order in which the ranks make their calls.
        everyone: all ranks of the group; `denoisers` are those that denoise.

    Raises:
        ConfigError: the strategy or attention backend is unknown or cannot run here, the strategy is a product for
            another number of ranks, the axes do not divide the ranks, the group's backend is not for the device,
            two ranks compute on one GPU, or an argument has a wrong type.
        RankLostError: a rank on a GPU did not come within the timeout.
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
        membership: Membership | None = None,
    ) -> None:
        self._group = group
        self.device = own_device(device)
        self.rank = 0 if group is None else group.rank()
        self.size = 1 if group is None else group.size()
        if group is not None and self.size > 1:
            check_backend(group, self.device)
            check_own_gpu(group, self.device, timeout)
        self.mesh = Mesh(self.size, cfg, chunk, decode_ranks)
        self.decodes = self.rank in self.mesh.decoding
        coordinates = (0, 0, 0) if self.decodes else self.mesh.coordinates(self.rank)
        self.cfg_rank, self.chunk_rank, self.sp_rank = coordinates
        if check_text("strategy", strategy) != AUTO:
            parse_strategy(strategy, self.mesh.sp)
        head_groups, overlap = check_whole("head_groups", head_groups), check_flag("overlap", overlap)
        check_choice("attention", attention, ATTENTION_BACKENDS)
        obstacle = attention_obstacle(attention, self.device)
        if obstacle is not None:
            raise ConfigError(f"attention: expected a backend that can run here, got {attention}, which {obstacle}")
        self.strategy, self.overlap, self.head_groups, self.attention = strategy, overlap, head_groups, attention
        self.comm_stats = CommStats()
        self.communicators: dict[tuple[str | None, tuple[int, ...]], Communicator] = {}
        self._membership, self._timeout = membership, timeout
        board = None if membership is None else membership.board
        if group is not None and membership is None and self.size > 1:
            board = NoticeBoard.of_group(group)
        self.turns = Turns(board, self.rank, lambda: self.comm_stats.started)
        self.everyone = Ranks(range(self.size), self.rank, self._communicator)
        self.denoisers = Ranks(self.mesh.denoising, self.rank, self._communicator)
        if decode_ranks:  # between all ranks, for tensors on the host
            self.host_communicator = self._communicator(range(self.size), backend="gloo")

    @classmethod
    def single(cls, strategy: str = AUTO, device: torch.device | str | None = None, **options: Any) -> SequenceParallel:
        """Makes the group of one process. `device` None is CUDA if there is any, else the CPU.

        `strategy` and `options` are arguments of the constructor, which also says what it raises.
        """
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
        """Makes the group of torchrun's environment (NCCL on CUDA, gloo on the CPU), or that of one process without it.

        With several ranks this affects the whole process: on Linux it gets SIGTERM when its launcher ends, or the
        thread of the launcher that started it. With the default `on_loss`, unless the program handles SIGTERM itself,
        SIGTERM prints the rank that is gone, if one is, and ends the process.

        Args:
            strategy: as in the constructor.
            device: where this rank computes; None for CUDA if there is any, else the CPU.
            timeout_s: how many seconds a rank may hold up the others before it counts as stuck.
            silence_s: how many seconds a rank may give no sign of life before it counts as lost.
            on_loss: called from the watchdog's thread with a line that names the lost rank; by default it prints the
                line and ends the process.
            siblings: the other ranks of this machine, for a caller that asks for them too.
            options: further arguments of the constructor.

        Raises:
            ConfigError: as in the constructor, or a time is not above 0, or this machine has fewer GPUs than ranks, or
                the environment says nonsense.
        """
        for seconds in (timeout_s, silence_s):
            if not (isinstance(seconds, Real) and 0 < seconds <= LONGEST_S):
                raise ConfigError(f"a timeout must be above 0 and at most {LONGEST_S:g} seconds, not {shown(seconds)}")
        environment = RankEnvironment.read()
        if environment.world_size == 1:
            return cls(None, strategy, device or default_device(), **options)
        environment.check_rendezvous()
        own = device_of_rank(device, environment.local_rank)
        mesh = Mesh(
            environment.world_size, options.get("cfg", 1), options.get("chunk", 1), options.get("decode_ranks", 0)
        )
        if check_text("strategy", strategy) != AUTO:
            parse_strategy(strategy, mesh.sp)  # wrong input raises before any rank waits for another
        membership = Membership(own, timeout_s, silence_s, on_loss, siblings or Siblings())
        parallel = cls(membership.group, strategy, own, timeout=membership.timeout, membership=membership, **options)
        peers = mesh.decoding if parallel.decodes else mesh.denoising
        membership.watch(parallel.comm_stats, peers, parallel.turns)
        return parallel

    def moved_to(self, device: torch.device) -> SequenceParallel:
        """Returns the group of one process, with the same options, on another device."""
        assert self.size == 1, "only the group of one process can move to another device"
        options: dict[str, Any] = {name: getattr(self, name) for name in ("overlap", "head_groups", "attention")}
        return SequenceParallel(self._group, self.strategy, device, **options)

    def check(self, grid: LatentGrid, heads: int) -> None:
        """Checks before any stream that the group can run a model.

        Args:
            grid: the latent frame in tokens.
            heads: the attention heads of the model.

        Raises:
            ConfigError: there are more ranks than tokens in a frame, or fewer heads than `ulysses` ranks or groups.
        """
        Shard(grid, 0, self.mesh.sp)
        check_head_groups(self.head_groups, self.strategy, self.mesh.sp, heads)
        if self.strategy != AUTO:
            parse_strategy(self.strategy, self.mesh.sp).check(heads)

    def label(self, layout: Layout) -> str:
        """Returns the name of a layout on this mesh, such as 2×ulysses if both branches of guidance run at once."""
        outer = self.mesh.cfg * self.mesh.chunk
        return layout.name if outer == 1 else f"{outer}×{layout.name}"

    def shard(self, grid: LatentGrid) -> Shard:
        """Returns the tokens of every frame that this rank owns.

        Raises:
            ConfigError: there are more ranks than tokens in a frame, or this rank only decodes.
        """
        if self.decodes:
            raise ConfigError(f"rank {self.rank} only decodes: it owns no tokens and can only run a pipeline's streams")
        return Shard(grid, self.sp_rank, self.mesh.sp)

    def gather_tokens(self, tokens_BFSE: Tensor, grid: LatentGrid) -> Tensor:
        """Gathers all tokens of some frames, (B, F, tokens of `grid`, E), on every rank of the `sp` axis.

        Raises:
            RankLostError: the collective failed.
        """
        if self.mesh.sp == 1:
            return tokens_BFSE
        sizes = [shard.tokens for shard in self.shard(grid).all]
        return self.sp_communicator().gather_tokens(tokens_BFSE, sizes)

    def all_gather_cfg(self, kind: str, tensor: Tensor) -> list[Tensor]:
        """Gathers a tensor of the same shape from every rank along the `cfg` axis.

        Args:
            kind: the kind of the collective, for `CommStats`.
            tensor: this rank's tensor.

        Returns:
            The tensors in order of `cfg_rank`, valid until the next call.
        """
        communicator = self._communicator(self.mesh.cfg_group(self.rank))
        return communicator.all_gather(kind, LAYERLESS, [tensor.shape] * self.mesh.cfg, tensor.contiguous()).wait()

    def spatial_shards(self, grid: LatentGrid, ranks: Sequence[int]) -> SpatialShards | None:
        """Returns the spatial shards of a picture that some ranks decode, or None for a single rank.

        Args:
            grid: the latent frame in tokens.
            ranks: the ranks that decode, this one included. All of them must call this.

        Raises:
            ConfigError: there are more ranks than the picture's longer side has latent pixels.
        """
        communicator = self.communicator_among(ranks)
        return SpatialShards(communicator, grid.latent_height, grid.latent_width) if communicator else None

    def sp_communicator(self) -> Communicator:
        """Returns the communicator of the `sp` axis, which has several ranks. All of them must call this."""
        return self._communicator(self.mesh.sp_group(self.rank))

    def communicator_among(self, ranks: Sequence[int]) -> Communicator | None:
        """Returns the communicator of some ranks, this one included, or None for one rank. All of them must call it."""
        return self._communicator(ranks) if len(ranks) > 1 else None

    def turn(self, call: str) -> AbstractContextManager[None]:
        """Runs the body as soon as all ranks are about to make the same call; see `Turns.take`."""
        return self.turns.take(call, range(self.size))

    def open_stream(self, ahead: bool = False) -> StreamTurns:
        """Makes the turns of a new stream; see `StreamTurns`. All ranks must call this in the same turn."""
        return StreamTurns(self.turns, self.mesh.denoising, ahead)

    def _communicator(self, ranks: Sequence[int], backend: str | None = None) -> Communicator:
        """The communicator of some ranks, made once, with the backend of the whole group if `backend` is None."""
        assert self._group is not None, "one process has no collectives"
        key = backend, tuple(ranks)
        if key not in self.communicators:
            group = self._group
            if len(ranks) < self.size or backend is not None:
                group = subgroup(self._group, ranks, backend, self._timeout)
            cause = (lambda: None) if self._membership is None else self._membership.cause
            self.communicators[key] = Communicator(group, self.comm_stats, cause)
        return self.communicators[key]

    def fail(self, error: BaseException) -> None:
        """Tells the other ranks that an error ends this program, where `sys.excepthook` does not see it."""
        if self._membership is not None:
            self._membership.fail(error)

    def close(self) -> None:
        """Stops the watchdog and destroys the process group, if `from_env` started them."""
        if self._membership is not None:
            self.turns.close()
            self._membership.close()
