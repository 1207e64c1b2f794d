"""The policies of the window in sessions and calls of a pipeline; tests/sampling compares them with plain lists."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from causalrope_sp import CausalVideoPipeline, ConfigError, VideoChunk

RED, BLUE = "a red circle slides right", "a blue circle slides right"
OPTIONS: dict[str, Any] = {"num_inference_steps": 2, "window": 8, "sink": 2, "chunk_frames": 2}


def pipe_of(policy: Any) -> CausalVideoPipeline:
    return CausalVideoPipeline.from_pretrained("toybox", window_policy=policy, **OPTIONS)


def with_a_new_prompt(pipe: CausalVideoPipeline, **change: Any) -> np.ndarray:
    with pipe.open(RED, seed=3) as session:
        chunks: list[VideoChunk] = [session.step() for _ in range(4)]
        session.set_prompt(BLUE, **change)
        chunks += [session.step() for _ in range(3)]
    return np.concatenate([chunk.frames for chunk in chunks if chunk.frames is not None])


def test_a_prompt_of_a_multi_shot_stream_begins_a_shot_unless_it_says_otherwise() -> None:
    sliding, multi_shot = pipe_of("sliding"), pipe_of("multi-shot")
    shot, kept = with_a_new_prompt(sliding, new_shot=True), with_a_new_prompt(sliding)
    assert not np.array_equal(shot, kept)
    assert np.array_equal(with_a_new_prompt(multi_shot), shot)
    assert np.array_equal(with_a_new_prompt(multi_shot, new_shot=False), kept)


def test_a_recomputed_window_changes_what_follows_once_frames_have_left_it() -> None:
    calls = [pipe_of(policy)(RED, seed=3, num_frames=45).frames[0] for policy in ("sliding", "recomputed")]
    sliding, recomputed = (np.asarray(frames) for frames in calls)
    first = 1 + 4 * (8 - 1)  # pixel frames of the window's length
    assert np.array_equal(sliding[:first], recomputed[:first])
    assert not np.array_equal(sliding[first:], recomputed[first:])


def test_a_saved_session_keeps_its_policy(tmp_path: Any) -> None:
    pipe, later = pipe_of("recomputed"), pipe_of("sliding")
    with pipe.open(RED, seed=3) as session:
        for _ in range(5):
            session.step()
        session.save(tmp_path / "s.safetensors")
        expected = np.asarray(session.step().frames)
    with later.resume(tmp_path / "s.safetensors") as session:
        assert np.array_equal(np.asarray(session.step().frames), expected)


def test_an_unknown_policy_is_refused() -> None:
    with pytest.raises(ConfigError, match="window_policy must be one of sliding, multi-shot, recomputed, not 'ring'"):
        pipe_of("ring")
