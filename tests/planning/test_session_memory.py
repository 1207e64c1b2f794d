"""The memory of open sessions: what `plan` says is what they hold, and what does not fit is refused beforehand."""

from __future__ import annotations

import gc
import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch.distributed import all_gather_object

from causalrope_sp import CausalVideoPipeline, ConfigError, LatentGrid, SequenceParallel
from causalrope_sp.cli.main import cli
from causalrope_sp.codec.codec_footprint import published_footprint
from causalrope_sp.codec.wan_vae_config import WAN_2_1
from causalrope_sp.config import PRESETS, CacheDtype
from causalrope_sp.devices import storage_bytes
from causalrope_sp.distributed.launch import RankPool
from causalrope_sp.pipeline import preflight
from causalrope_sp.pipeline.session import Session
from causalrope_sp.planning.cost import plan
from causalrope_sp.planning.machines import machine
from causalrope_sp.planning.memory import AuxiliaryMemory
from causalrope_sp.planning.workload import Workload
from tests.support.controlled import controlled_toybox, noise_control

RED, BLUE = "a red circle slides right", "a blue circle slides right"
SMALL = 600_000  # bytes: tables of angles and timesteps
CASES: list[dict[str, Any]] = [
    {},
    {"history": 2},
    {"history": 1, "kept_chunks": 5, "window": 8, "sink": 2},
    {"guidance_scale": 2.0, "negative_prompt": BLUE, "history": 2, "kept_chunks": 0},
]


def filled(pipe: CausalVideoPipeline, prompt: str = RED, **options: Any) -> Session:
    """A session whose window, kept latents and history are full."""
    session = pipe.open(prompt, seed=1, **{"kept_chunks": 3, "num_inference_steps": 2, "window": 7, **options})
    for _ in range(10):
        session.step()
    return session


def held(session: Session) -> int:
    return storage_bytes(session.tensors())


@pytest.fixture(scope="module")
def pipe() -> CausalVideoPipeline:
    return CausalVideoPipeline.from_pretrained("toybox", device="cpu")


@pytest.mark.parametrize("cache", ["model", "int8", "fp8"])
@pytest.mark.parametrize("options", CASES, ids=str)
def test_the_plan_of_a_session_is_what_it_holds(
    pipe: CausalVideoPipeline, options: dict[str, Any], cache: CacheDtype
) -> None:
    if cache != "model":
        pipe = CausalVideoPipeline.from_pretrained("toybox", device="cpu", cache=cache)
    session = filled(pipe, **options)
    assert held(session) == session.planned_bytes
    fork = session.fork()
    fork.step()
    assert held(fork) == fork.planned_bytes, "once it has written, it has a cache of its own"


def test_the_control_is_counted() -> None:
    pipe, pipe_without = controlled_toybox(), CausalVideoPipeline.from_pretrained("toybox", device="cpu")
    session = filled(pipe, control=noise_control, window=13)
    assert held(session) == session.planned_bytes > filled(pipe_without, window=13).planned_bytes


def on_ranks(group: Any, device: str, strategy: str, cfg: int, cache: CacheDtype) -> list[tuple[int, int]]:
    parallel = SequenceParallel(group, strategy, device, cfg=cfg)
    pipe = CausalVideoPipeline.from_pretrained(
        "toybox", parallel=parallel, guidance_scale=2.0, decode="spatial", cache=cache
    )
    session = filled(pipe, history=1)
    ranks: list[Any] = [None] * group.size()
    all_gather_object(ranks, (held(session), session.planned_bytes), group)
    return ranks


@pytest.mark.parametrize(
    ("strategy", "cfg", "cache"),
    [("ulysses", 1, "model"), ("ulysses", 1, "int8"), ("shard-kv", 1, "model"), ("auto", 2, "model")],
)
def test_every_rank_holds_what_is_planned(pool: RankPool, strategy: str, cfg: int, cache: CacheDtype) -> None:
    for holds, planned in pool.run(on_ranks, 2, strategy, cfg, cache):
        # a shard of the picture has a border more than half of it, where a layer reads its neighbours
        assert holds == pytest.approx(planned, rel=0.02)


def live() -> dict[int, int]:
    """The memory of every tensor, by its address; copies of weights in a layout of oneDNN's by their object."""
    gc.collect()
    found = {}
    for x in gc.get_objects():
        if type(x) is torch.Tensor:
            if x.layout == torch.strided:
                found[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            else:
                found[id(x)] = x.numel() * x.itemsize
    return found


def test_a_second_session_costs_its_state_and_no_more(pipe: CausalVideoPipeline) -> None:
    first = filled(pipe, history=1)
    before = live()
    second = filled(pipe, BLUE, history=1)
    added = {address: size for address, size in live().items() if address not in before}
    assert 0 <= sum(added.values()) - second.planned_bytes < SMALL
    first.close()
    assert second.step().index == 10, "what they shared outlives the first one"


def test_what_does_not_fit_is_refused_before_anything_is_made(
    pipe: CausalVideoPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = filled(pipe)
    before = live()
    free = 9 * 10**6  # the session alone would fit
    monkeypatch.setattr(preflight, "free_bytes", lambda device: free)
    with pytest.raises(ConfigError, match=r"short by .* other sessions 0\.00\d+.*: .*closing other sessions") as caught:
        pipe.open(BLUE, num_inference_steps=2, window=7)
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="other sessions"):
        first.fork()
    with pytest.raises(ConfigError, match="other sessions"):
        pipe.stream(BLUE)
    del caught
    assert live().keys() <= before.keys()
    assert first.step().index == 10, "the open session goes on"
    first.close()

    free = 60 * 10**6
    with pytest.raises(ConfigError, match=r"history 4\.\d+, .* fit: .*a history of \d\d"):
        pipe.open(RED, history=9_999, window=7)
    allowed = pipe.open(RED, history=9, window=7)
    allowed.close()


def test_what_other_sessions_will_hold_counts_before_they_hold_it(
    pipe: CausalVideoPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sessions that have not begun hold nothing yet."""
    monkeypatch.setattr(preflight, "free_bytes", lambda device: 40 * 10**6)
    opened: list[Session] = []

    def open_many() -> None:
        for _ in range(40):
            opened.append(pipe.open(RED, window=7))

    with pytest.raises(ConfigError, match="other sessions"):
        open_many()
    assert 2 < len(opened) < 20
    for session in opened:
        session.close()
    pipe.open(RED, window=7).close()


def test_the_command_counts_sessions_and_history() -> None:
    def planned(*words: str) -> dict[str, Any]:
        result = CliRunner().invoke(cli, ["plan", "--gpu", "h200", "--ranks", "1", "--json", *words])
        assert result.exit_code == 0, result.output
        return json.loads(result.output)["strategies"][0]

    alone, three = (
        planned("--history", "2", "--kept-chunks", "64"),
        planned("--history", "2", "--kept-chunks", "64", "--sessions", "3"),
    )
    one = sum(alone["session"].values())
    assert three["memory_bytes"] - alone["memory_bytes"] == 2 * one
    state = published_footprint(WAN_2_1, 480, 832, 3).state
    assert alone["session"]["decoder"] == 3 * state == pytest.approx(3 * 3.78e9, rel=0.01)
    plain = planned()
    assert plain["session"]["decoder"] == state
    assert plain["session"]["history"] == 0
    peaks = (each["bytes_by_time"]["decode"] for each in (alone, plain))
    more = sum(alone["session"].values()) - sum(plain["session"].values())
    assert next(peaks) - next(peaks) == more + state, "the state before a chunk is kept while it is decoded"
    words = CliRunner().invoke(cli, ["plan", "--sessions", "2", "--gpu", "h200"], env={"COLUMNS": "200"}).output
    assert "each further session" in words
    assert "(GB above are for 2 sessions, parts and times for one)" in words


def test_a_graph_has_a_pool_for_every_session() -> None:
    work = Workload(PRESETS["wan2.1-1.3b"], LatentGrid.from_pixels(480, 832, 8), window=21, chunk_frames=3, steps=4)
    (eager,) = plan(work, 1, machine("h200", "nvlink"), auxiliary=AuxiliaryMemory(), sessions=2)
    (by_graphs,) = plan(work, 1, machine("h200", "nvlink"), auxiliary=AuxiliaryMemory(graphs=True), sessions=2)
    assert by_graphs.memory_bytes - eager.memory_bytes == 2 * eager.activation_bytes
    assert replace(by_graphs, sessions=1).memory_bytes == by_graphs.memory_bytes - by_graphs.session.bytes
