"""`similar_frames` of pipelines and on the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from causalrope_sp import CausalVideoPipeline, ConfigError, SamplerConfig, StreamConfig
from causalrope_sp.cli.main import cli
from causalrope_sp.compression.segments import parse_settings, settings_of
from causalrope_sp.heads import HeadPolicy
from causalrope_sp.toybox import WEIGHTS
from tests.support.videos import video_of

PROMPT = "a red circle slides right"
HEADS = HeadPolicy(((None,) * 6, *((5, None, 8, 5, None, 5),) * 5))


def video(**options: Any) -> np.ndarray:
    pipe = CausalVideoPipeline.from_pretrained("toybox", device="cpu", **options)
    return np.asarray(video_of(pipe, PROMPT, num_frames=61))


def test_toybox_keeps_its_video() -> None:
    dense, some, schedule = video(), video(similar_frames=4), video(similar_frames=0.3)
    assert np.array_equal(video(similar_frames=13), dense)
    for made in (some, schedule, video(similar_frames=4, heads=HEADS)):
        assert 28 < 10 * np.log10(255**2 / np.mean((made.astype(float) - dense) ** 2)) < 60


def test_a_quantized_cache_is_read_frame_by_frame() -> None:
    both = {"similar_frames": 4, "heads": HEADS}
    some, quantized = video(**both), video(**both, cache="int8")
    assert 40 < 10 * np.log10(255**2 / np.mean((quantized.astype(float) - some) ** 2)) < 80
    assert np.array_equal(video(similar_frames=13, cache="int8"), video(cache="int8"))


def test_a_pipeline_json_may_say_it(tmp_path: Path) -> None:
    model_config = json.loads((WEIGHTS / "toybox.json").read_text())
    model_config |= {name: str(WEIGHTS / model_config[name]) for name in ("transformer", "codec")}
    model_config["stream"]["similar_frames"] = 4
    (tmp_path / "pipeline.json").write_text(json.dumps(model_config))
    pipe = CausalVideoPipeline.from_pretrained(tmp_path, device="cpu")
    assert np.array_equal(np.asarray(video_of(pipe, PROMPT, num_frames=61)), video(similar_frames=4))
    assert pipe.config.as_json()["stream"]["similar_frames"] == 4


@pytest.mark.parametrize(("similar", "heads"), [(4, HEADS), (0.3, None)])
def test_a_saved_session_goes_on_and_attends_what_it_does_not_know(
    similar: float, heads: HeadPolicy | None, tmp_path: Path
) -> None:
    """The means of saved frames are not saved, so these frames are attended until they leave the window, and what
    follows is not the same."""
    pipe = CausalVideoPipeline.from_pretrained("toybox", device="cpu", similar_frames=similar, heads=heads)
    with pipe.open(PROMPT, seed=1) as session:
        for _ in range(6):
            session.step()
        session.save(tmp_path / "s.safetensors")
        going_on = [session.step().frames for _ in range(5)]
    plain = CausalVideoPipeline.from_pretrained("toybox", device="cpu")
    for resuming in (pipe, plain):
        with resuming.resume(tmp_path / "s.safetensors") as resumed:
            made = [resumed.step().frames for _ in range(5)]
        close = []
        for frames, expected in zip(made, going_on, strict=True):
            assert frames is not None
            assert expected is not None
            close.append(10 * np.log10(255**2 / np.mean((frames.astype(float) - expected) ** 2)))
        assert min(close) > 25
        assert close[0] < 60


def test_the_header_of_a_compressed_video_holds_it() -> None:
    for similar in (4, 0.3, None):
        stream, sampler = StreamConfig(13, 1, 3, similar_frames=similar), SamplerConfig()
        header = json.loads(json.dumps(settings_of(stream, sampler)))
        assert parse_settings(header) == (stream, sampler)


def test_on_the_command_line(tmp_path: Path) -> None:
    out = tmp_path / "v.mp4"
    for words, status in ((["--similar-frames", "4"], 0), (["--similar-frames", "1.5"], 2)):
        result = CliRunner().invoke(cli, ["generate", PROMPT, "--frames", "61", *words, "--out", str(out)])
        assert result.exit_code == status, result.output
        assert out.exists() == (status == 0)
        out.unlink(missing_ok=True)
    assert result.output == "error: similar_frames must be a whole number, or a share between 0 and 1, not 1.5\n"
    with pytest.raises(ConfigError, match=r"similar_frames must be a finite number of at least 0 .* not -1"):
        video(similar_frames=-1)
    with pytest.raises(ConfigError, match="similar_frames must be None with window_policy recomputed"):
        video(similar_frames=4, window_policy="recomputed")
