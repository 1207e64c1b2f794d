"""Model folders as people have them: one that diffusers wrote, a checkpoint of the transformer alone with it as base, a
Hub repository, and what `save_pretrained` writes. diffusers and huggingface_hub are the judges."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from causalrope_sp import CausalVideoPipeline, CheckpointError, ConfigError
from causalrope_sp.toybox import WEIGHTS
from tests.support.published_folders import save_checkpoint, wan_pipeline

PROMPT = "the quick brown fox jumps over the lazy dog"
SMALL: dict[str, Any] = {"height": 64, "width": 96, "num_frames": 9, "seed": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("published") / "Self-Forcing-Small-Diffusers"
    wan_pipeline(home.parent).save_pretrained(home)
    return home


@pytest.fixture(scope="module")
def checkpoint(folder: Path) -> Path:
    """The same transformer as Self-Forcing's training leaves it."""
    return save_checkpoint(folder)


def video_of(model: Path | str, **options: Any) -> np.ndarray:
    pipe = CausalVideoPipeline.from_pretrained(model, device="cpu", **options)
    pipe.set_progress_bar_config(disable=True)
    frames = pipe(PROMPT, **SMALL).frames
    assert isinstance(frames, np.ndarray)
    return frames


def test_a_folder_and_a_checkpoint_with_it_as_base_make_the_same_video(folder: Path, checkpoint: Path) -> None:
    whole = video_of(folder)
    assert whole.shape == (1, 9, 64, 96, 3)
    assert whole.dtype == np.float32
    assert whole.std() > 0.01
    assert (video_of(checkpoint, base=folder) == whole).all()


def test_what_was_inferred_is_said_in_one_line(
    folder: Path, checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", logger="causalrope_sp"):
        CausalVideoPipeline.from_pretrained(checkpoint, base=folder, device="cpu", height=64, width=96)
    (line,) = [record.message for record in caplog.records if "preset" in record.message]
    assert "self-forcing" in line
    assert "window 21, steps 1000, 750, 500, 250, shift 5" in line
    assert str(folder) in line


def test_a_preset_and_a_pipeline_file_come_before_what_is_inferred(folder: Path, tmp_path: Path) -> None:
    pipe = CausalVideoPipeline.from_pretrained(folder, device="cpu", preset="longlive-1.3b")
    assert (pipe.config.stream.window, pipe.config.stream.sink) == (12, 3)
    own = {
        "transformer": str(folder / "transformer"),
        "codec": str(folder / "vae"),
        "text": {"path": str(folder)},
        "height": 64,
        "width": 96,
    }
    (tmp_path / "pipeline.json").write_text(json.dumps(own))
    assert (video_of(tmp_path, preset="self-forcing") == video_of(folder, preset="self-forcing")).all()


def test_a_checkpoint_without_a_base_says_what_it_needs(folder: Path, checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"a transformer alone: name a folder or repository .* as base"):
        CausalVideoPipeline.from_pretrained(checkpoint, device="cpu")
    with pytest.raises(CheckpointError, match="has no VAE and no text encoder in it"):
        CausalVideoPipeline.from_pretrained(checkpoint, base=tmp_path, device="cpu")
    with pytest.raises(CheckpointError, match=r"base .* is not a folder"):
        CausalVideoPipeline.from_pretrained(checkpoint, base=tmp_path / "none", device="cpu")
    with pytest.raises(ConfigError, match="unknown preset"):
        CausalVideoPipeline.from_pretrained(checkpoint, base=folder, preset="nobody", device="cpu")


def test_a_repository_is_opened_from_the_cache(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As huggingface_hub lays a downloaded repository down; no server is asked."""
    repository = tmp_path / "hub" / "models--people--small-wan"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0123456789abcdef0123456789abcdef01234567")
    snapshot = repository / "snapshots" / "0123456789abcdef0123456789abcdef01234567"
    snapshot.parent.mkdir()
    snapshot.symlink_to(folder, target_is_directory=True)
    options: dict[str, Any] = {"cache_dir": tmp_path / "hub", "local_files_only": True, "preset": "self-forcing"}
    assert (video_of("people/small-wan", **options) == video_of(folder, preset="self-forcing")).all()
    with pytest.raises(CheckpointError, match="cannot get people/other-wan from the Hub"):
        video_of("people/other-wan", **options)
    with pytest.raises(CheckpointError, match="cannot get people/small-wan from the Hub"):
        video_of("people/small-wan", revision="v9", **options)


def test_what_is_saved_is_read_by_diffusers_and_makes_the_same_video(folder: Path, tmp_path: Path) -> None:
    from diffusers import AutoencoderKLWan, DiffusionPipeline, WanTransformer3DModel

    pipe = CausalVideoPipeline.from_pretrained(folder, device="cpu")
    pipe.save_pretrained(tmp_path / "saved")
    for kind, name in ((WanTransformer3DModel, "transformer"), (AutoencoderKLWan, "vae")):
        there, here = kind.from_pretrained(folder / name), kind.from_pretrained(tmp_path / "saved" / name)
        assert there.state_dict().keys() == here.state_dict().keys()
        assert all(torch.equal(there.state_dict()[key], value) for key, value in here.state_dict().items())
    whole = DiffusionPipeline.from_pretrained(tmp_path / "saved")
    assert type(whole).__name__ == "WanPipeline"
    assert whole.scheduler.config.flow_shift == pipe.config.sampler.shift
    assert (video_of(tmp_path / "saved") == video_of(folder)).all()


def test_toybox_is_saved_and_opened_again(tmp_path: Path) -> None:
    pipe = CausalVideoPipeline.from_pretrained("toybox", device="cpu")
    pipe.save_pretrained(tmp_path / "toybox")
    again = CausalVideoPipeline.from_pretrained(tmp_path / "toybox", device="cpu")
    first, second = (
        np.concatenate([chunk.frames for chunk in p.stream("a red circle bounces", num_frames=21)])
        for p in (pipe, again)
    )
    assert (first == second).all()


def test_an_embedded_model_is_a_base(tmp_path: Path) -> None:
    pipe = CausalVideoPipeline.from_pretrained(
        WEIGHTS / "toybox.safetensors", base="toybox", device="cpu", window=13, sink=1
    )
    assert (pipe.height, pipe.width) == (64, 64)
    assert "text encoder and VAE of toybox" in "; ".join(pipe.config.inferred)
