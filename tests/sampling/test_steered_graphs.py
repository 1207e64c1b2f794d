"""Streams that are steered make the same chunks by graphs as by eager passes."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from causalrope_sp import SequenceParallel
from causalrope_sp.distributed.launch import RankPool
from causalrope_sp.sampling.steered_loop import SteeredLoop
from causalrope_sp.sampling.stream_options import StreamOptions
from tests.support.graph_runs import Install, install
from tests.support.list_session import SAMPLER
from tests.support.steered_runs import GRID, NOISE, SCRIPTS, STREAMS, TEXTS, by_loop, in_turn
from tests.support.strategy_runs import make_model


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Install:
    return partial(install, monkeypatch)


def single() -> SequenceParallel:
    return SequenceParallel.single(device="cpu")


def alike(made: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(*pair) for pair in zip(made, expected, strict=True))


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("stream", STREAMS)
def test_scripts_by_graphs_are_the_eager_ones(stream: str, script: str, graphs: Install) -> None:
    eager = by_loop(single(), stream, script)
    (made, found) = graphs(), by_loop(single(), stream, script)
    assert alike(found, eager)
    assert sum(each.replays for each in made) > 0


def scripts_on_ranks(group: dist.ProcessGroup, device: str, strategy: str, turn: int) -> list[bool]:
    """Whether scripts on every stream give the same by graphs, from each rank."""
    same = True
    for stream, script in in_turn(turn):
        eager = by_loop(SequenceParallel(group, strategy, device), stream, script)
        with pytest.MonkeyPatch.context() as patch:
            install(patch)
            same &= alike(by_loop(SequenceParallel(group, strategy, device), stream, script), eager)
    everyone: list[Any] = [None] * group.size()
    dist.all_gather_object(everyone, same)
    return everyone


@pytest.mark.parametrize(("turn", "strategy"), [(0, "ulysses"), (1, "gather-kv")])
def test_scripts_by_graphs_on_ranks(pool: RankPool, turn: int, strategy: str) -> None:
    assert pool.run(scripts_on_ranks, 2, strategy, turn) == [True, True]


@torch.inference_mode()
def forked() -> list[Tensor]:
    """A stream and its fork, each of which goes on under another text."""
    options = StreamOptions(stream=STREAMS["sink within a chunk"], sampler=SAMPLER)
    loop = SteeredLoop(make_model(), TEXTS[0], NOISE, GRID, None, single(), options)
    made = [loop.step().latents for _ in range(6)]
    fork = loop.fork()
    fork.set_text([TEXTS[1]])
    for _ in range(5):
        made += [fork.step().latents, loop.step().latents]
    return made


def test_a_fork_has_graphs_of_its_own(graphs: Install) -> None:
    eager = forked()
    made = graphs()
    assert alike(forked(), eager)
    assert made[0].replays > 0
