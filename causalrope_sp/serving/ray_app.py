"""Live sessions on Ray Serve: replicas of several ranks each, which share a folder of kept sessions.

    serve run docs/ray_serve.yaml

A replica is rank 0 of a torch.distributed group of its own; the other ranks are Ray actors in the bundles of the
replica's placement group. A WebSocket stays at its replica for as long as it is open. A viewer whose connection is
lost names its replica when it comes back and finds its session there; if a rank of the replica has gone, another
replica takes the session from the folder.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.serve.config import RequestRouterConfig
from ray.util.placement_group import get_current_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from causalrope_sp.checks import check_fields, check_flag, check_text
from causalrope_sp.distributed import SequenceParallel
from causalrope_sp.errors import ConfigError, first_line
from causalrope_sp.pipeline.load_options import LoadOptions
from causalrope_sp.pipeline.pipeline import CausalVideoPipeline
from causalrope_sp.serving.access import AccessControl
from causalrope_sp.serving.app import build_app
from causalrope_sp.serving.commands import follow
from causalrope_sp.serving.event_log import log_event
from causalrope_sp.serving.ray_router import StickyRouter
from causalrope_sp.serving.run import GOODBYE_S
from causalrope_sp.serving.server import Server
from causalrope_sp.serving.server_options import ServerOptions

NAMESPACE = "causalrope_sp"  # of the ranks' actors
SPARE_REQUESTS = 8  # that a replica answers beside its sessions' connections: the page, and facts

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RayOptions:
    """The options of a deployment, which are the `args` of its file.

    Args:
        folder: a folder that all machines share, where saved and kept sessions are.
        model: as for `CausalVideoPipeline.from_pretrained`.
        ranks: of each replica.
        gpu: whether each rank has a GPU; without, each has one CPU.
        min_replicas, max_replicas: how many replicas there are, by the number of open sessions.
        target_sessions: open sessions a replica at which there are neither too many nor too few replicas.
        autoscaling: further fields of Ray Serve's `AutoscalingConfig`, such as `upscale_delay_s`.
        timeout_s: how many seconds a rank may hold up the others before it counts as stuck.
        loading: fields of `LoadOptions`.
        parallel: arguments of `SequenceParallel`, such as `strategy`.
        serving: fields of `ServerOptions`, such as `token`; hosts and ports are Ray Serve's.

    Raises:
        ConfigError: a value has the wrong type or is outside its range.
    """

    folder: str
    model: str = "toybox"
    ranks: int = 1
    gpu: bool = False
    min_replicas: int = 1
    max_replicas: int = 1
    target_sessions: int = 2
    autoscaling: Mapping[str, Any] = field(default_factory=dict)
    timeout_s: float = 600
    loading: Mapping[str, Any] = field(default_factory=dict)
    parallel: Mapping[str, Any] = field(default_factory=dict)
    serving: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_text("folder", self.folder)
        check_text("model", self.model)
        check_flag("gpu", self.gpu)
        check_fields(self, ("ranks", "min_replicas", "max_replicas", "target_sessions"), most=100_000)
        if self.max_replicas < self.min_replicas:
            raise ConfigError(f"max_replicas must be at least {self.min_replicas}, not {self.max_replicas}")
        self.server_options()
        self.load_options()

    def server_options(self) -> ServerOptions:
        """Returns the options of each replica's server, which keeps its sessions at every change."""
        own = {"folder": Path(self.folder), "keep_every_change": True}
        return _made(ServerOptions, "serving", {**self.serving, **own})

    def load_options(self) -> LoadOptions:
        """Returns how each rank loads the model."""
        return _made(LoadOptions, "loading", self.loading)

    def load(self) -> CausalVideoPipeline:
        """Loads the model on a rank, as its environment says."""
        device = "cuda" if self.gpu else "cpu"
        parallel = SequenceParallel.from_env(
            device=device, timeout_s=self.timeout_s, silence_s=min(20.0, self.timeout_s), **self.parallel
        )
        return CausalVideoPipeline.from_pretrained(self.model, self.load_options(), parallel=parallel)


def _made(kind: Any, name: str, fields: Mapping[str, Any]) -> Any:
    try:
        return kind(**fields)
    except TypeError as error:
        raise ConfigError(f"{name} has a field that is not known: {first_line(error)}") from error


class Follower:
    """A rank of a replica that is not the first."""

    def run(self, options: RayOptions, environment: dict[str, str]) -> None:
        """Follows rank 0 to its end."""
        os.environ.update(environment)
        pipe = options.load()
        follow(pipe)
        pipe.parallel.close()


@serve.ingress()
class Replica:
    """Rank 0 of a replica, with its server.

    Args:
        options: of the deployment.
    """

    def __init__(self, options: RayOptions) -> None:
        _log_events()
        name = serve.get_replica_context().replica_id.unique_id
        self._followers = _start_followers(options, name)
        self._pipe = options.load()
        self._server = Server(self._pipe, Path(options.model).name, options.server_options(), _leave, shared=True)
        self._server.facts["replica"] = name
        self._server.engine.start()

    def __serve_build_asgi_app__(self) -> AccessControl:
        return build_app(self._server)

    async def __del__(self) -> None:
        """Keeps the sessions and ends the ranks, when Ray Serve stops the replica."""
        if hasattr(self, "_server"):
            await asyncio.to_thread(self._server.engine.stop)
            self._pipe.parallel.close()


def _log_events() -> None:
    """Sends the library's log to this process's stderr, which Ray keeps."""
    logger = logging.getLogger("causalrope_sp")
    logger.setLevel(logging.INFO)
    logger.addHandler(logging.StreamHandler())


def _start_followers(options: RayOptions, name: str) -> list[Any]:
    """Starts the other ranks of a replica, and tells this process that it is the first."""
    if options.ranks == 1:
        return []
    address = ray.util.get_node_ip_address()
    with socket.create_server((address, 0)) as free:
        port = free.getsockname()[1]
    # each process sees the one GPU that Ray gives it, and has no siblings that a launcher on its machine has started
    common = {"WORLD_SIZE": options.ranks, "LOCAL_WORLD_SIZE": 1, "LOCAL_RANK": 0}
    rendezvous = {"MASTER_ADDR": address, "MASTER_PORT": port}
    environments = [
        {key: str(value) for key, value in {**common, **rendezvous, "RANK": rank}.items()}
        for rank in range(options.ranks)
    ]
    followers = []
    for rank in range(1, options.ranks):
        place = PlacementGroupSchedulingStrategy(get_current_placement_group(), placement_group_bundle_index=rank)
        actor = ray.remote(num_cpus=1, num_gpus=int(options.gpu), scheduling_strategy=place)(Follower)
        follower = actor.options(name=f"{name}-rank-{rank}", namespace=NAMESPACE).remote()
        follower.run.remote(options, environments[rank])
        followers.append(follower)
    os.environ.update(environments[0])
    return followers


def _leave(error: BaseException) -> None:
    """Ends the replica's process, in place of which Ray Serve starts another one; its viewers have been told."""
    log_event(_log, "replica ends", level=logging.ERROR, error=type(error).__name__, message=str(error))
    time.sleep(GOODBYE_S / 5)
    os._exit(1)


def build(args: dict[str, Any]) -> serve.Application:
    """Builds the application of a deployment file.

    Args:
        args: the fields of `RayOptions`.

    Raises:
        ConfigError: an option is wrong.
    """
    options: RayOptions = _made(RayOptions, "args", args)
    bundle = {"CPU": 1.0, **({"GPU": 1.0} if options.gpu else {})}
    deployment = serve.deployment(
        Replica,
        ray_actor_options={"num_cpus": 1, "num_gpus": int(options.gpu)},
        placement_group_bundles=[bundle] * options.ranks,
        placement_group_strategy="PACK",
        request_router_config=RequestRouterConfig(request_router_class=StickyRouter),
        max_ongoing_requests=options.server_options().max_sessions + SPARE_REQUESTS,
        autoscaling_config={
            **options.autoscaling,
            "min_replicas": options.min_replicas,
            "max_replicas": options.max_replicas,
            "target_ongoing_requests": options.target_sessions,
        },
        health_check_period_s=2,
        graceful_shutdown_timeout_s=10,
    )
    return deployment.bind(options)
