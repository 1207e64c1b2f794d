"""Sessions with a cache in 8 bits, whose keys mean nothing without what was taken off them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from causalrope_sp import CausalVideoPipeline
from causalrope_sp.errors import CheckpointError, ConfigError
from causalrope_sp.pipeline.session import Session
from tests.support.graph_runs import install
from tests.support.loras import save_lora

RED, BLUE = "a red circle slides right", "a blue square bounces"
OPTIONS: dict[str, Any] = {"num_inference_steps": 2, "window": 7, "sink": 1}


def opened(**options: Any) -> CausalVideoPipeline:
    return CausalVideoPipeline.from_pretrained("toybox", device="cpu", **OPTIONS, **options)


def take(session: Session, count: int) -> list[Any]:
    return [session.step().frames for _ in range(count)]


def same(one: list[Any], other: list[Any]) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("cache", ["int8", "fp8"])
def test_a_first_chunk_that_was_cut_short_leaves_nothing(cache: str) -> None:
    pipe, fails = opened(cache=cache), [True]

    def after_step(*_: object) -> dict[str, Any]:
        if fails and fails.pop():
            raise ValueError("the first step")
        return {}

    session = pipe.open(RED, seed=3, callback_on_step_end=after_step)
    with pytest.raises(ValueError, match="the first step"):
        session.step()
    session.set_prompt(BLUE)
    assert same(take(session, 3), take(pipe.open(BLUE, seed=3), 3))


@pytest.mark.parametrize("graphs", [False, True], ids=["", "graphs"])
@pytest.mark.parametrize("rope", ["absolute", "relative"])
def test_a_session_that_is_taken_back_to_its_beginning_is_a_new_one(
    rope: str, graphs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = opened(cache="int8", rope=rope)
    expected = take(pipe.open(BLUE, seed=3), 6)
    if graphs:
        install(monkeypatch)
    session = pipe.open(RED, seed=3, history=6)
    take(session, 6)
    assert session.rewind(6)
    session.set_prompt(BLUE)
    assert same(take(session, 6), expected)


def test_weights_that_made_nan_leave_none(tmp_path: Path) -> None:
    lora = save_lora(tmp_path / "strong.safetensors", "time_projection.1", 0, sizes=(192, 1152))
    pipe = opened(cache="int8")
    pipe.load_lora_weights(f"{lora}:1e30")
    session = pipe.open(RED, seed=3, kept_chunks=2)
    session.step()
    with pytest.raises(ConfigError, match="not finite"):
        session.step()
    pipe.unload_lora_weights()
    session.rewind(1)
    assert same(take(session, 2), take(pipe.open(RED, seed=3), 2))


def test_what_no_quantized_cache_holds_is_refused(tmp_path: Path) -> None:
    """Keys without their offsets, offsets beyond all keys, and scales of 0, below 0, infinite and NaN."""
    pipe = opened(cache="int8")
    session = pipe.open(RED, seed=3)
    take(session, 3)
    session.save(tmp_path / "s")
    with safe_open(tmp_path / "s", "pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()
    offsets, layer = "offsets/conditional", "cache/conditional/1"
    changes: list[tuple[str, Any, str]] = [
        (offsets, None, "keys of conditional need the offsets that were taken off them"),
        (offsets, tensors[offsets] * 1e30, "the offsets of conditional: expected at most"),
    ]
    for scale in (0.0, -1.0, torch.inf, torch.nan):
        changed = tensors[layer].clone()
        changed[1, 0, 2, 3, 4, -2:] = torch.tensor([scale], dtype=torch.float16).view(torch.int8)
        changes.append((layer, changed, "keys and values of layer 1, conditional, hold .* expected scales above 0"))
    for name, tensor, said in changes:
        others = {key: value for key, value in tensors.items() if key != name}
        save_file(others if tensor is None else others | {name: tensor}, tmp_path / "other", metadata)
        with pytest.raises(CheckpointError, match=said):
            pipe.resume(tmp_path / "other")
