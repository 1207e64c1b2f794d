"""Latte's door: a diffusers folder against diffusers' own pipeline, on one rank and on several, and the command."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
import torch.distributed as dist
from click.testing import CliRunner
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    LattePipeline,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from PIL import Image
from torch import Tensor

from causalrope_sp import CheckpointError, ConfigError
from causalrope_sp.cli.main import cli
from causalrope_sp.distributed import SequenceParallel
from causalrope_sp.distributed.launch import RankPool
from causalrope_sp.reuse import Broadcast, ReusePolicy
from causalrope_sp.spatiotemporal.kinds import kind_of
from causalrope_sp.spatiotemporal.latte.latte_pipeline import SCHEDULERS
from causalrope_sp.spatiotemporal.opening import open_video_pipeline
from causalrope_sp.spatiotemporal.video_pipeline import VideoOptions
from tests.support.latte_folder import save_latte_folder

PROMPT, NEGATIVE = "A red circle slides right", "the blue hills"
SIZE = {"height": 48, "width": 80, "num_inference_steps": 5}
PYRAMID = ReusePolicy((Broadcast("self", 2), Broadcast("temporal", 3), Broadcast("cross", 4)), "gated")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_latte_folder(tmp_path_factory.mktemp("latte"))


@cache
def theirs(folder: Path, kind: str, **options: Any) -> Any:
    """Latents, (1, F, C, H, W), or pixels, (T, H, W, 3) in [0, 255], of diffusers' pipeline."""
    pipe = LattePipeline.from_pretrained(folder, torch_dtype=torch.float64)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(3)
    call = {"video_length": 5, "negative_prompt": NEGATIVE, "clean_caption": False, **SIZE, **options}
    frames = pipe(PROMPT, generator=generator, output_type=kind, **call).frames
    return frames.transpose(1, 2) if kind == "latent" else 255 * frames[0]


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def opened(folder: Path, parallel: SequenceParallel | None = None, **options: Any) -> Any:
    return open_video_pipeline(folder, VideoOptions(**{"dtype": "float64", **SIZE, **options}), parallel)


def latents(pipe: Any, negative: str | None = NEGATIVE, reuse: ReusePolicy | None = None) -> Tensor:
    found = pipe.latents(pipe._noise(5, 3), 5, PROMPT, negative, reuse)
    assert isinstance(found, Tensor)
    return found


@pytest.mark.parametrize("options", [{}, {"guidance_scale": 1.0}, {"height": 64, "width": 32}])
def test_latents_are_diffusers(folder: Path, options: dict[str, Any]) -> None:
    assert relative(latents(opened(folder, **options)), theirs(folder, "latent", **options)) < 1e-12


def test_the_null_text_is_diffusers(folder: Path) -> None:
    found = latents(opened(folder), negative=None)
    assert relative(found, theirs(folder, "latent", negative_prompt="")) < 1e-12
    assert relative(found, theirs(folder, "latent")) > 1e-3


@pytest.mark.parametrize(
    "scheduler",
    [
        DDIMScheduler(),  # clips
        DPMSolverMultistepScheduler(),
        EulerDiscreteScheduler(),
        PNDMScheduler(skip_prk_steps=True),
        UniPCMultistepScheduler(),
    ],
)
def test_schedulers_are_diffusers(tmp_path: Path, scheduler: Any) -> None:
    assert type(scheduler).__name__ in SCHEDULERS
    save_latte_folder(tmp_path, scheduler)
    assert relative(latents(opened(tmp_path)), theirs(tmp_path, "latent")) < 1e-6  # some compute in float32


def test_pixels_are_diffusers_frame_by_frame(folder: Path) -> None:
    chunks = list(opened(folder).stream(PROMPT, num_frames=5, seed=3, negative_prompt=NEGATIVE))
    assert [(chunk.index, chunk.first_frame_index, len(chunk.frames)) for chunk in chunks] == [
        (n, n, 1) for n in range(5)
    ]
    found, expected = np.concatenate([chunk.frames for chunk in chunks]), theirs(folder, "np")
    assert np.abs(found - expected).max() <= 0.501  # rounded to 8 bits


def on_ranks(group: dist.ProcessGroup | None, device: str, folder: Path, cfg: int) -> list[Any]:
    parallel = SequenceParallel(group, cfg=cfg)
    pipe = opened(folder, parallel)
    chunks = list(pipe.stream(PROMPT, num_frames=5, seed=3, negative_prompt=NEGATIVE))
    assert all((chunk.frames is None) == (parallel.rank > 0) for chunk in chunks)
    reused = latents(pipe, reuse=PYRAMID)
    return [latents(pipe), reused, parallel.rank or np.concatenate([chunk.frames for chunk in chunks])]


@pytest.mark.parametrize(("ranks", "cfg"), [(2, 1), (3, 1), (2, 2)])
def test_ranks_make_the_same_video(pool: RankPool, folder: Path, ranks: int, cfg: int) -> None:
    plain, reused, pixels = pool.run(on_ranks, ranks, folder, cfg)
    assert relative(plain, theirs(folder, "latent")) < 1e-12
    assert relative(reused, latents(opened(folder), reuse=PYRAMID)) < 1e-12
    assert relative(reused, plain) > 1e-3
    assert np.abs(pixels - theirs(folder, "np")).max() <= 0.501


def test_the_command_writes_the_video(folder: Path, tmp_path: Path) -> None:
    """Losslessly as PNGs; --frames, --height and --width are the model's own where they are not given."""
    words = ["generate", PROMPT, "--model", str(folder), "--steps", "5", "--seed", "3", "--dtype", "float64"]
    more = ["--height", "48", "--width", "80", "--frames", "5", "--negative-prompt", NEGATIVE, "--json"]
    done = CliRunner().invoke(cli, [*words, *more, "--out", f"{tmp_path / 'frames'}/"])
    assert done.exit_code == 0, done.output
    summary = json.loads(done.stdout.splitlines()[-1])
    assert (summary["frames"], summary["strategy"]) == (5, "dynamic")
    for file, frame in zip(sorted((tmp_path / "frames").iterdir()), theirs(folder, "np"), strict=True):
        assert np.abs(np.asarray(Image.open(file)).astype(float) - frame).max() <= 0.501


def test_the_models_own_settings(folder: Path, tmp_path: Path) -> None:
    words = ["generate", PROMPT, "--model", str(folder), "--steps", "1", "--out", str(tmp_path / "video.mp4"), "--json"]
    done = CliRunner().invoke(cli, words)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout.splitlines()[-1])["frames"] == 16
    with av.open(str(tmp_path / "video.mp4")) as video:
        assert video.streams.video[0].average_rate == 8


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--window", "3"], "Latte makes its video at once: it has no --window to set"),
        (["--endless"], "Latte makes its video at once: it has no --endless to set"),
        (["--height", "50"], "height must be a multiple of 16, not 50"),
        (["--frames", "0"], "--frames must be"),
        (["--steps", "1001"], "the steps must be at most the 1000 that the model was trained with, not 1001"),
        (["--guidance", "0.5"], "guidance_scale must be a finite number of at least 1, not 0.5"),
        (["--reuse", "pab:open-sora", "--steps", "2"], "reuse: the rule for"),
    ],
)
def test_wrong_options_are_one_line(folder: Path, tmp_path: Path, words: list[str], said: str) -> None:
    done = CliRunner().invoke(
        cli, ["generate", PROMPT, "--model", str(folder), "--out", str(tmp_path / "v.mp4"), *words]
    )
    assert (done.exit_code, done.output.count("\n")) == (2, 1), done.output
    assert said in done.output


@pytest.mark.parametrize(
    ("part", "file", "change", "said"),
    [
        ("scheduler", "scheduler_config.json", {"_class_name": "DDPMScheduler"}, "the scheduler must be one of DDIM"),
        ("scheduler", "scheduler_config.json", {"thresholding": True}, "must have no thresholding"),
        ("scheduler", "scheduler_config.json", {"num_train_timesteps": 4}, "the steps must be at most the 4"),
        ("text_encoder", "config.json", {"d_model": "x"}, "cannot read .*text_encoder: "),
        ("vae", "config.json", {"latent_channels": "x"}, "cannot read .*vae: "),
    ],
)
def test_parts_that_do_not_fit_are_one_line(
    folder: Path, tmp_path: Path, part: str, file: str, change: dict[str, Any], said: str
) -> None:
    for each in folder.iterdir():
        if each.name != part:
            (tmp_path / each.name).symlink_to(each)
    (tmp_path / part).mkdir()
    for each in (folder / part).iterdir():
        (tmp_path / part / each.name).write_bytes(each.read_bytes())
    declared = json.loads((folder / part / file).read_text())
    (tmp_path / part / file).write_text(json.dumps(declared | change))
    with pytest.raises((CheckpointError, ConfigError), match=said) as raised:
        list(opened(tmp_path).stream(PROMPT, num_frames=2))
    assert "\n" not in str(raised.value)
    assert torch.get_default_dtype() == torch.float32, "transformers' default dtype stayed"


def test_a_folder_says_what_it_is(folder: Path, tmp_path: Path) -> None:
    assert kind_of(folder) == "latte"
    assert kind_of(tmp_path) is None
    assert kind_of("toybox") is None
    (tmp_path / "model_index.json").write_text("{")
    assert kind_of(tmp_path) is None
    with pytest.raises(CheckpointError, match="is no folder of Latte or Open-Sora"):
        open_video_pipeline(tmp_path)
    assert DDPMScheduler.__name__ not in SCHEDULERS
