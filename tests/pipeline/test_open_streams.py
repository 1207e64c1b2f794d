"""A pipeline is not moved or cast under an open stream, which goes on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from causalrope_sp import CausalVideoPipeline, ConfigError

PROMPT, FRAMES = "a red circle slides right", 21


@pytest.fixture
def pipe() -> CausalVideoPipeline:
    return CausalVideoPipeline.from_pretrained("toybox")


def stream(pipe: CausalVideoPipeline) -> Iterator[Any]:
    return pipe.stream(PROMPT, num_frames=FRAMES, num_inference_steps=1)


@pytest.mark.parametrize("started", [False, True])
def test_moving_is_refused_while_a_stream_is_open(pipe: CausalVideoPipeline, started: bool) -> None:
    expected = [chunk.frames for chunk in stream(pipe)]
    chunks, made = stream(pipe), []
    if started:
        made.append(next(chunks).frames)
    for wrong in (
        lambda: pipe.to(torch.float64),
        lambda: pipe.to("cpu"),
        lambda: pipe.to("cpu", dtype="bfloat16"),
    ):
        with pytest.raises(ConfigError, match="cannot be moved or cast, and 1 are open: finish them, or call their"):
            wrong()
    made += [chunk.frames for chunk in chunks]
    assert all(np.array_equal(one, other) for one, other in zip(made, expected, strict=True))
    assert pipe.to(torch.float64).model.dtype == torch.float64


def test_a_stream_that_is_closed_or_forgotten_is_not_open(pipe: CausalVideoPipeline) -> None:
    closed, forgotten = stream(pipe), stream(pipe)
    next(forgotten)
    closed.close()  # type: ignore[attr-defined]
    del forgotten
    assert pipe.to(torch.float64).model.dtype == torch.float64


def test_a_model_that_is_cast_under_a_stream_is_one_sentence(pipe: CausalVideoPipeline) -> None:
    chunks = stream(pipe)
    next(chunks)
    pipe.model.double()
    with pytest.raises(ConfigError, match=r"moved or cast: torch.float32 on cpu and torch.float64 on cpu"):
        next(chunks)
