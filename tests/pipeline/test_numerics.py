"""A pipeline makes the same video whatever the caller's global settings of torch are, and leaves them as they were."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from causalrope_sp import CausalVideoPipeline
from causalrope_sp.pipeline.numerics import own_numerics

PROMPT = "a red circle slides right"


@pytest.fixture(scope="module")
def pipe() -> CausalVideoPipeline:
    return CausalVideoPipeline.from_pretrained("toybox")


@pytest.fixture(scope="module")
def expected(pipe: CausalVideoPipeline) -> np.ndarray:
    return pipe(PROMPT, num_frames=9, output_type="np").frames[0]


def test_default_dtype_of_the_caller(pipe: CausalVideoPipeline, expected: np.ndarray) -> None:
    torch.set_default_dtype(torch.float64)
    try:
        found = pipe(PROMPT, num_frames=9, output_type="np").frames[0]
        opened = CausalVideoPipeline.from_pretrained("toybox")
        again = opened(PROMPT, num_frames=9, output_type="np").frames[0]
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert np.array_equal(found, expected)
    assert np.array_equal(again, expected)


def test_autocast_of_the_caller(pipe: CausalVideoPipeline, expected: np.ndarray) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = pipe(PROMPT, num_frames=9, output_type="np").frames[0]
        streamed = [chunk.frames for chunk in pipe.stream(PROMPT, num_frames=9) if chunk.frames is not None]
        assert torch.is_autocast_enabled("cpu")
    assert np.array_equal(found, expected)
    assert np.array_equal(np.concatenate(streamed), np.round(expected * 255).astype(np.uint8))


def test_the_callers_dtype_comes_back_after_an_error() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        with own_numerics():
            assert torch.get_default_dtype() == torch.float32
        with pytest.raises(ZeroDivisionError), own_numerics():
            _ = 1 / 0
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
