"""`causalrope-sp generate` and `encode` in one process."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from causalrope_sp.errors import ConfigError
from causalrope_sp.text import load_embeds
from tests.support import text_files as files
from tests.support.shell import MODEL, PROMPT, StartEndless, frames_in, pictures, run, shell

KEYS = ["frames", "height", "width", "fps_generated", "first_frame_s", "seconds", "ranks", "strategy", "out", "chunks"]
KEYS += ["timings", "communication", "stored_bytes", "head_imbalance"]


def test_generate_takes_pictures_and_videos_in(tmp_path: Path) -> None:
    first, video, out = tmp_path / "first.png", tmp_path / "video.mp4", tmp_path / "out.mp4"
    Image.new("RGB", (90, 70), "red").save(first)
    words: list[object]
    for words, target, frames in (
        (["--image", first, "--frames", 14], video, 14),
        (["--video", video, "--continue", "--frames", 5], out, 5),
        (["--video", video, "--strength", 0.5, "--codec", "wan"], out, 14),
    ):
        result = shell("generate", PROMPT, "--model", MODEL, *words, "--out", target, "--json")
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout)["frames"] == frames


@pytest.mark.parametrize("name", ["a.mp4", "a.gif", "a.webp", "a/"])
def test_generate_writes_every_kind_and_json_has_its_keys(name: str, tmp_path: Path) -> None:
    out = f"{tmp_path}/{name}"
    result = shell("generate", PROMPT, "--model", MODEL, "--frames", 11, "--out", out, "--json")
    assert result.exit_code == 0, result.output
    (line,) = result.output.splitlines()
    summary = json.loads(line)
    assert list(summary) == KEYS
    assert (summary["frames"], summary["ranks"], summary["out"]) == (11, 1, out)
    assert len(summary["chunks"]) == 2
    assert all(ms > 0 for ms in summary["chunks"])
    assert list(summary["timings"]) == ["denoise", "decode", "wait", "total"]
    assert summary["timings"]["total"]["max"] == pytest.approx(max(summary["chunks"]), abs=0.01)
    assert 0 < summary["first_frame_s"] <= summary["seconds"]
    assert summary["fps_generated"] == pytest.approx(11 / summary["seconds"], rel=1e-2)
    assert sorted(os.listdir(tmp_path)) == [name.rstrip("/")]
    if name == "a/":
        assert pictures(tmp_path / "a").shape == (11, summary["height"], summary["width"], 3)
    if name == "a.mp4":
        assert frames_in(tmp_path / name) == 11


def test_the_same_seed_gives_the_same_file_and_another_seed_another(tmp_path: Path) -> None:
    for name, seed in (("a/", 1), ("b/", 1), ("c/", 2)):
        words = ("generate", PROMPT, "--model", MODEL, "--frames", 5, "--seed", seed, "--out", f"{tmp_path}/{name}")
        assert shell(*words).exit_code == 0
    a, b, c = (pictures(tmp_path / name) for name in "abc")
    assert np.array_equal(a, b)
    assert not np.array_equal(a, c)


def test_a_process_is_silent_on_stderr_where_there_is_no_terminal(tmp_path: Path) -> None:
    done = run("generate", PROMPT, "--model", MODEL, "--frames", 5, "--out", tmp_path / "a.mp4")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{tmp_path}/a.mp4: 5 frames of ")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_keeps_the_frames_so_far(number: signal.Signals, tmp_path: Path, start_endless: StartEndless) -> None:
    out = tmp_path / "a.mp4"
    process = start_endless(out, [sys.executable])
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    frames = frames_in(out)
    assert frames > 0
    assert errors == f"stopped: {frames} frames are in {out}\n"
    assert os.listdir(tmp_path) == ["a.mp4"]


def test_a_fault_is_told_with_its_reason_and_keeps_the_frames_so_far(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from causalrope_sp.pipeline.pipeline import CausalVideoPipeline

    whole = CausalVideoPipeline.stream

    def breaks(self: CausalVideoPipeline, *args: Any, **kwargs: Any) -> Iterator[Any]:
        yield next(iter(whole(self, *args, **kwargs)))
        raise RuntimeError("boom")

    monkeypatch.setattr(CausalVideoPipeline, "stream", breaks)
    result = shell("generate", PROMPT, "--model", MODEL, "--out", tmp_path / "a.mp4")
    assert result.exit_code == 1
    assert "Traceback" in result.output
    assert result.output.endswith("error on rank 0: RuntimeError: boom\n")
    assert frames_in(tmp_path / "a.mp4") == 9


def test_wrong_input_midway_says_where_the_frames_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from causalrope_sp.pipeline.pipeline import CausalVideoPipeline

    whole = CausalVideoPipeline.stream

    def refuses(self: CausalVideoPipeline, *args: Any, **kwargs: Any) -> Iterator[Any]:
        yield next(iter(whole(self, *args, **kwargs)))
        raise ConfigError("no more of this")

    monkeypatch.setattr(CausalVideoPipeline, "stream", refuses)
    result = shell("generate", PROMPT, "--model", MODEL, "--frames", 20, "--out", tmp_path / "a.mp4")
    partial = tmp_path / "a.partial.mp4"
    assert (result.exit_code, os.listdir(tmp_path)) == (2, ["a.partial.mp4"])
    assert result.output.endswith(f"stopped: 9 of 20 frames are in {partial}\nerror: no more of this\n")
    assert frames_in(partial) == 9


def test_umt5_encodes_from_the_shell(tmp_path: Path) -> None:
    files.save_wan(tmp_path, files.make_encoder())
    file = tmp_path / "e.safetensors"
    result = shell("encode", "a dog", "--text", tmp_path, "--out", file)
    assert result.exit_code == 0, result.output
    assert re.fullmatch(rf"{file}: \d+ tokens of 24 numbers in \d+\.\d s\n", result.output)
    loaded = load_embeds(file)
    assert (loaded.prompt, loaded.encoder) == ("a dog", "umt5, 2 layers of 24, wan layout, float32")
    assert loaded.embeds.shape == (1, 512, 24)
    refused = shell("generate", "--text-embeds", file, "--out", tmp_path / "a.mp4")
    assert refused.exit_code == 2
    assert "text embeddings have shape (1, 512, 24), the model takes (1, 3, 51)" in refused.output


def test_the_plain_example_runs(tmp_path: Path) -> None:
    done = run(PROMPT, tmp_path / "a.mp4", 11, command=(sys.executable, "examples/generate.py"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(f"11 frames in {tmp_path}/a.mp4\n")
    assert frames_in(tmp_path / "a.mp4") == 11
