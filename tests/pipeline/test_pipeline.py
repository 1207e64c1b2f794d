"""The pipeline as a caller meets it: any number of frames, one video however it is asked for, recipes that fail."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from causalrope_sp import CausalDiT, CausalVideoPipeline, CheckpointError, ConfigError, DiTConfig
from causalrope_sp.cache.kv_cache import KVCache
from causalrope_sp.grid import Chunk
from causalrope_sp.toybox import WEIGHTS
from causalrope_sp.weights.digest import digest
from tests.support.videos import video_of
from tests.support.watching import noted

PROMPT = "a large red circle slides right"


@pytest.fixture(scope="module")
def pipe() -> CausalVideoPipeline:
    return CausalVideoPipeline.from_pretrained("toybox")


@pytest.fixture(scope="module")
def longest(pipe: CausalVideoPipeline) -> np.ndarray:
    return _made(pipe, 34)


def _made(pipe: CausalVideoPipeline, frames: int) -> np.ndarray:
    video = video_of(pipe, PROMPT, num_frames=frames, seed=3)
    assert video is not None
    return video


@pytest.mark.parametrize("frames", [1, 8, 9, 10, 21, 22, 33])
def test_a_shorter_video_is_the_start_of_a_longer_one(
    pipe: CausalVideoPipeline, longest: np.ndarray, frames: int
) -> None:
    video = _made(pipe, frames)
    assert video.shape == (frames, pipe.height, pipe.width, 3)
    assert np.abs(video.astype(int) - longest[:frames]).max() <= 1  # another window is another order of additions


def test_chunks_follow_one_another(pipe: CausalVideoPipeline, longest: np.ndarray) -> None:
    chunks = list(pipe.stream(PROMPT, num_frames=34, seed=3))
    parts = [chunk.frames for chunk in chunks]
    assert [chunk.index for chunk in chunks] == [0, 1, 2, 3]
    assert [chunk.first_frame_index for chunk in chunks] == [0, 9, 21, 33]
    assert all(part is not None and part.dtype == np.uint8 for part in parts)
    assert np.array_equal(np.concatenate([part for part in parts if part is not None]), longest)


def test_warming_up_fills_a_cache_of_the_real_size_and_leaves_no_trace(
    pipe: CausalVideoPipeline, longest: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    windows: list[int] = []
    chunks: list[Chunk] = []
    made = noted(KVCache.__init__, lambda self, *args, **_: windows.append(args[2].frames))
    monkeypatch.setattr(KVCache, "__init__", made)
    monkeypatch.setattr(KVCache, "open", noted(KVCache.open, lambda self, chunk: chunks.append(chunk)))
    pipe.warm_up()
    assert windows == [pipe.config.stream.window]
    assert chunks[-1].start >= windows[0]  # in a window that was full before
    assert not pipe.parallel.comm_stats.total().calls
    assert np.array_equal(_made(pipe, 34), longest)


def test_seed_and_prompt_decide_the_video(pipe: CausalVideoPipeline, longest: np.ndarray) -> None:
    other = video_of(pipe, PROMPT, num_frames=9, seed=4)
    assert other is not None
    assert np.abs(other.astype(int) - longest[:9]).max() > 50


def test_two_streams_of_one_pipeline_do_not_meet(pipe: CausalVideoPipeline, longest: np.ndarray) -> None:
    one, other = pipe.stream(PROMPT, num_frames=21, seed=3), pipe.stream("a blue square pulses", num_frames=21, seed=9)
    mine = []
    for chunk, _ in zip(one, other, strict=True):
        assert chunk.frames is not None
        mine.append(chunk.frames)
    assert np.array_equal(np.concatenate(mine), longest[:21])


def test_a_video_of_hours_begins_at_once(pipe: CausalVideoPipeline) -> None:
    first = next(pipe.stream(PROMPT, num_frames=10**15, seed=3))
    assert first.frames is not None
    assert len(first.frames) == 9


def test_steps_are_bounded() -> None:
    with pytest.raises(
        ConfigError, match="num_inference_steps must be a whole number of at least 1 and at most 1000, not 1001"
    ):
        CausalVideoPipeline.from_pretrained("toybox", num_inference_steps=1001)


@pytest.mark.parametrize("frames", [0, -1])
def test_no_frames_are_refused_before_anything_runs(pipe: CausalVideoPipeline, frames: int) -> None:
    with pytest.raises(ConfigError, match="num_frames must be a whole number of at least 1"):
        pipe.stream(PROMPT, num_frames=frames)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"text": "umt5-xxs"}, ConfigError, "unknown text encoder 'umt5-xxs'"),
        ({"height": "64"}, ConfigError, "height must be a whole number of at least 1, not '64'"),
        ({"fps": None}, ConfigError, "fps must be a finite number of at least 1 and at most 1000, not None"),
        ({"height": 63}, ConfigError, "height 63 is not divisible by 16; the nearest that work: 48 or 64"),
        ({"transformer": "none.safetensors"}, CheckpointError, "none.safetensors"),
        ({"codec": "none"}, CheckpointError, "cannot read the codec"),
        ({"stream": {"windw": 12}}, CheckpointError, "windw"),
        ({"sampler": {"steps": []}}, ConfigError, "step"),
        ({"colour": "red"}, CheckpointError, "colour"),
    ],
)
def test_a_recipe_that_cannot_work_is_one_line(
    tmp_path: Path, change: dict[str, object], error: type[Exception], message: str
) -> None:
    model_config = json.loads((WEIGHTS / "toybox.json").read_text())
    model_config |= {
        "transformer": str(WEIGHTS / model_config["transformer"]),
        "codec": str(WEIGHTS / model_config["codec"]),
    }
    (tmp_path / "pipeline.json").write_text(json.dumps(model_config | change))
    with pytest.raises(error, match=message) as caught:
        CausalVideoPipeline.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_the_digest_tells_weights_apart(dtype: torch.dtype) -> None:
    config = DiTConfig(dim=12, ffn_dim=12, num_heads=1, num_layers=1, text_dim=4, text_len=2, freq_dim=4)
    torch.manual_seed(0)
    model = CausalDiT(config).to(dtype).requires_grad_(False)
    before = digest(model)
    assert digest(model) == before
    weight = model.get_parameter("blocks.0.ffn.up.weight")
    weight[3, 4] = weight[3, 4] * (1 + 2 * torch.finfo(dtype).eps)
    changed = digest(model)
    weight[[0, 1]] = weight[[1, 0]]
    assert len({before, changed, digest(model)}) == 3
