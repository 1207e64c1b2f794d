"""Two replicas of two ranks each on Ray Serve: a rank of one is killed, and its session goes on at the other."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from websockets.exceptions import WebSocketException

from causalrope_sp.errors import ConfigError
from causalrope_sp.pipeline.pipeline import CausalVideoPipeline
from tests.support.paths import ROOT
from tests.support.servers import SeenChunk, Viewer

OWN_WARNINGS = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Ray's own code
pytestmark = [pytest.mark.ray, pytest.mark.timeout(600), OWN_WARNINGS]
RED, GREEN = "a large red circle slides right", "a large green circle slides right"
LOADING: dict[str, Any] = {"num_inference_steps": 1, "window": 7}
WITHIN_S = 60.0
PATIENCE_S = 180.0  # for a replica to start on a busy machine
DEPLOYMENT = yaml.safe_load((ROOT / "docs" / "ray_serve.yaml").read_text())
APPLICATION = DEPLOYMENT["applications"][0]


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The deployment of the documentation, on this machine: the address of its WebSocket."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_AUTH_MODE", "disabled")  # it would write a token to the home folder
        patch.setenv("RAY_memory_monitor_refresh_ms", "0")  # other tests may need the memory of this machine
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "kernels")]))
        import ray
        from ray import serve

        from causalrope_sp.serving.ray_app import build

        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        folder = tempfile.mkdtemp(prefix="ray")  # short: it holds sockets
        ray.init(num_cpus=4, include_dashboard=False, object_store_memory=100 * 2**20, _temp_dir=folder)
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        at_once = {"upscale_delay_s": 0, "metrics_interval_s": 1, "look_back_period_s": 2}
        replicas = {"min_replicas": 1, "max_replicas": 2, "target_sessions": 1, "autoscaling": at_once}
        own = {"folder": str(tmp_path_factory.mktemp("shared")), "loading": LOADING, **replicas}
        serve.run(build({**APPLICATION["args"], **own}), name="live")
        yield f"ws://127.0.0.1:{port}/v1/realtime"
        serve.shutdown()
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


def opened(url: str, **fields: Any) -> tuple[Viewer, dict[str, Any]]:
    """Opens a session, as soon as some replica lets it. Its viewer may be left unread: the messages of a lead of H.264
    do not fill the client's queue, beyond which it would answer no ping."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        viewer = Viewer(url)
        with suppress(WebSocketException, OSError):
            viewer.__enter__()
            answer = viewer.ask("open", **fields)
            if answer["type"] == "ack":
                return viewer, answer
            viewer.__exit__()
        time.sleep(0.2)
    raise TimeoutError("no replica opens the session")


def opened_elsewhere(url: str, replicas: set[str], **fields: Any) -> tuple[Viewer, dict[str, Any]]:
    """Opens a session at another replica than these, as soon as there is one."""
    deadline = time.monotonic() + PATIENCE_S
    while (new := opened(url, **fields))[1]["replica"] in replicas:
        assert time.monotonic() < deadline, "no other replica comes"
        new[0].ask("close")
        new[0].__exit__()
        time.sleep(0.5)
    return new


def test_the_session_of_a_killed_rank_goes_on_elsewhere_without_a_lost_chunk(url: str) -> None:
    import ray

    from causalrope_sp.serving.ray_app import NAMESPACE

    first, told = opened(url, prompt=RED, seed=5)
    more, _ = opened(url, prompt=RED)  # one replica has two sessions, which is one too many
    second, others = opened_elsewhere(url, {told["replica"]}, prompt=GREEN, seed=6)
    assert told["ranks"] == others["ranks"] == 2
    seen: list[SeenChunk] = [first.next_chunk() for _ in range(3)]
    beside: list[SeenChunk] = [second.next_chunk()]
    changed = first.ask("prompt", prompt=GREEN)
    ray.kill(ray.get_actor(f"{told['replica']}-rank-1", namespace=NAMESPACE))
    killed = time.monotonic()
    with suppress(WebSocketException, OSError):
        while True:
            seen.append(first.next_chunk())
    first.__exit__()
    beside.append(second.next_chunk())
    again, back = opened(f"{url}?replica={told['replica']}", session=told["session"], played=seen[-1].head["sequence"])
    seen.append(again.next_chunk())
    assert time.monotonic() - killed < WITHIN_S
    assert back["replica"] != told["replica"]
    assert back["prompts"][1] == {"prompt_id": 1, "from_chunk": changed["from_chunk"], "prompt": GREEN}
    while seen[-1].head["chunk"] < changed["from_chunk"] + 1:
        seen.append(again.next_chunk())
    assert [chunk.head["chunk"] for chunk in seen] == list(range(len(seen)))
    beside.append(second.next_chunk())
    pipe = CausalVideoPipeline.from_pretrained("toybox", **LOADING)
    for prompt, seed, chunks in ((RED, 5, seen), (GREEN, 6, beside)):
        with pipe.open(prompt, seed=seed) as alone:
            for chunk in chunks:
                if chunks is seen and chunk.head["chunk"] == changed["from_chunk"]:
                    alone.set_prompt(GREEN)
                right = alone.step().frames
                assert right is not None
                assert np.abs(chunk.frames.astype(int) - right).mean() < 4
    assert again.ask("close")["type"] == "ack"
    again.__exit__()
    third, _ = opened_elsewhere(url, {told["replica"], others["replica"]}, prompt=RED)
    assert third.next_chunk().head["chunk"] == 0, "the replica of the killed rank is replaced"
    for viewer in (more, second, third):
        viewer.__exit__()


def test_a_viewer_who_comes_back_gets_the_replica_of_its_session(url: str) -> None:
    first, told = opened(url, prompt=RED, seed=5)
    more, _ = opened(url, prompt=RED)
    second, others = opened_elsewhere(url, {told["replica"]}, prompt=GREEN, seed=6)
    returned = []
    for viewer, opening in ((first, told), (second, others)):
        seen = viewer.next_chunk()
        for _ in range(4):  # by chance one in 16 would do so
            viewer.__exit__()
            named = f"{url}?replica={opening['replica']}"
            viewer, back = opened(named, session=opening["session"], played=seen.head["sequence"])
            assert back["replica"] == opening["replica"]
            seen = viewer.next_chunk()
        assert seen.head["chunk"] == 4
        returned.append(viewer)
    stranger, _ = opened(f"{url}?replica=gone&replica=%ff", prompt=RED)
    for viewer in (*returned, stranger, more):
        assert viewer.ask("close")["type"] == "ack"
        viewer.__exit__()


def test_the_file_of_the_documentation_is_one_of_ray_serve() -> None:
    from ray.serve.schema import ServeDeploySchema

    from causalrope_sp.serving import ray_app

    assert ServeDeploySchema(**DEPLOYMENT).applications[0].import_path == f"{ray_app.__name__}:build"


def test_options_of_a_deployment_are_checked_before_anything_starts(tmp_path: Path) -> None:
    from causalrope_sp.serving.ray_app import build

    good = {"folder": str(tmp_path)}
    wrong: dict[str, dict[str, Any]] = {
        "args has a field that is not known": {"rank": 2},
        "ranks must be a whole number of at least 1": {"ranks": 0},
        "max_replicas must be at least 3, not 2": {"min_replicas": 3, "max_replicas": 2},
        "serving has a field that is not known": {"serving": {"sessions": 1}},
        "token must be set for host 0.0.0.0": {"serving": {"host": "0.0.0.0"}},
        "window": {"loading": {"window": 0}},
    }
    for message, fields in wrong.items():
        with pytest.raises(ConfigError, match=message):
            build({**good, **fields})
