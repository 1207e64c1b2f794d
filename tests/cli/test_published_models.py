"""A published checkpoint from the shell, and the completion of a model's name."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from click.shell_completion import ShellComplete
from PIL import Image

from causalrope_sp.cli.main import cli
from tests.support.controlled import write_controlled_toybox
from tests.support.paths import ROOT
from tests.support.published_folders import (
    experts_pipeline,
    i2v_pipeline,
    save_checkpoint,
    save_wan_folder,
    ti2v_pipeline,
    wan_pipeline,
)
from tests.support.shell import shell


def test_a_checkpoint_alone_streams_to_stdout_with_a_base_and_a_log(tmp_path: Path) -> None:
    folder, log = tmp_path / "Wan-Small-Diffusers", tmp_path / "run.log"
    wan_pipeline(tmp_path).save_pretrained(folder)
    line = [sys.executable, "-m", "causalrope_sp", "generate", "a quick dog", "--frames", "9", "--device", "cpu"]
    line += ["--model", str(save_checkpoint(folder)), "--base", str(folder), "--height", "64", "--width", "96"]
    done = subprocess.run(
        [*line, "-v", "--log-file", str(log), "--out", "-"], capture_output=True, timeout=120, cwd=ROOT
    )
    errors = done.stderr.decode()
    assert done.returncode == 0, errors
    assert done.stdout[4:8] == b"ftyp"
    with av.open(io.BytesIO(done.stdout), "r") as video:
        assert [(frame.width, frame.height) for frame in video.decode(video=0)] == [(96, 64)] * 9
    (said,) = [line for line in errors.splitlines() if "preset" in line]
    assert said.startswith(f"{tmp_path}/self_forcing_dmd.pt: preset self-forcing (")
    inferred = f"steps 1000, 750, 500, 250, shift 5; text encoder and VAE of {folder}; fps 16 by the stride of its VAE"
    assert said.endswith(f"window 21, {inferred}")
    assert "\n-: 9 frames of 96×64 in " in errors
    assert f" rank 0 causalrope_sp.pipeline.loading INFO: {said}\n" in log.read_text()


@pytest.mark.parametrize("kind", ["ti2v", "ti2v in Wan's own folder", "a14b", "i2v-a14b"])
def test_newer_families_run_from_the_shell(kind: str, tmp_path: Path) -> None:
    """With an image, where the model takes one."""
    picture, words = tmp_path / "first.png", list[object]()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)).save(picture)
    if kind == "ti2v in Wan's own folder":
        model = save_wan_folder(ti2v_pipeline(tmp_path), tmp_path / "model", num_heads=2, model_type="ti2v")
    else:
        model = tmp_path / "model"
        pipes: dict[str, Callable[[Path], Any]]
        pipes = {"ti2v": ti2v_pipeline, "a14b": experts_pipeline, "i2v-a14b": partial(i2v_pipeline, experts=True)}
        pipes[kind](tmp_path).save_pretrained(model)
    if kind != "a14b":
        words = ["--image", picture]
    line = ["generate", "a quick dog", "--frames", 17, "--device", "cpu", "--steps", 2, "--chunk-frames", 3]
    line += ["--model", model, "--height", 64, "--width", 96, "--out", tmp_path / "video.mp4", "--window", 6]
    done = shell(*line, *words)
    assert done.exit_code == 0, done.output
    with av.open(str(tmp_path / "video.mp4"), "r") as video:
        stream = video.streams.video[0]
        assert stream.average_rate == (24 if kind.startswith("ti2v") else 16)
        assert [(frame.width, frame.height) for frame in video.decode(stream)] == [(96, 64)] * 17
    if kind != "i2v-a14b":
        planned = shell("plan", "--model", model, "--window", 6, "--height", 64, "--width", 96, "--ranks", 2, "--json")
        assert planned.exit_code == 0, planned.output
    refused = shell(*line)
    assert (refused.exit_code, "--image: expected a picture" in refused.output) == (
        (2, True) if kind == "i2v-a14b" else (0, False)
    )


def test_a_model_that_takes_a_control_is_not_run_from_the_shell(tmp_path: Path) -> None:
    model = write_controlled_toybox(tmp_path / "model")
    for command in ("generate", "bench", "profile-heads", "profile-reuse"):
        done = shell(command, "a red circle slides right", "--model", model)
        assert (done.exit_code, done.output.count("\n")) == (2, 1), done.output
        assert "--model: expected a model without a control, got" in done.output


def completions(*words: str) -> list[str]:
    *args, begun = words
    found = ShellComplete(cli, {}, "causalrope-sp", "_CAUSALROPE_SP_COMPLETE").get_completions(args, begun)
    return [item.value for item in found if item.type == "plain"]


def test_the_shell_completes_a_model() -> None:
    from causalrope_sp.toybox import EMBEDDED

    assert completions("generate", "--model", "") == list(EMBEDDED)
    assert completions("generate", "--model", "toy") == list(EMBEDDED)
    assert completions("generate", "--model", "none") == []
