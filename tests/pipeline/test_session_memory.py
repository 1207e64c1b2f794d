"""What a session leaves behind: nothing that waits for Python to look for cycles, since that may be long after."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from causalrope_sp.pipeline.pipeline import CausalVideoPipeline

RED, GREEN = "a large red circle slides right", "a large green circle stays still"


@pytest.fixture
def found_in_cycles() -> Iterator[list[object]]:
    """What was found in cycles so far; nothing is looked for while the test runs."""
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    yield gc.garbage
    gc.set_debug(0)
    gc.garbage.clear()
    gc.enable()


def steer(pipe: CausalVideoPipeline, file: Path) -> None:
    """Does to a session what can be done to one."""
    with pipe.open(RED, seed=1, history=2) as session:
        for _ in range(4):
            session.step()
        session.set_prompt(GREEN)
        session.step()
        session.rewind(1)
        with session.fork(seed=2) as other:
            other.step()
        session.step()
        session.save(file)
    with pipe.resume(file) as session:
        session.step()


@pytest.mark.parametrize("rope", ["absolute", "relative"])
def test_a_session_that_is_closed_leaves_no_cycle(found_in_cycles: list[object], tmp_path: Path, rope: str) -> None:
    pipe = CausalVideoPipeline.from_pretrained("toybox", num_inference_steps=2, window=7, rope=rope)
    steer(pipe, tmp_path / "first")  # what is made once stays
    gc.collect()
    found_in_cycles.clear()
    steer(pipe, tmp_path / "second")
    gc.collect()
    assert [each for each in found_in_cycles if isinstance(each, torch.Tensor)] == []
    assert {type(each).__name__ for each in found_in_cycles if "causalrope" in type(each).__module__} == set()
