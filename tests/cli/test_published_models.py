"""A published checkpoint from the shell, and the completion of a model's name."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import av
from click.shell_completion import ShellComplete

from causalrope_sp.cli.main import cli
from tests.support.paths import ROOT
from tests.support.published_folders import save_checkpoint, wan_pipeline


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


def completions(*words: str) -> list[str]:
    *args, begun = words
    found = ShellComplete(cli, {}, "causalrope-sp", "_CAUSALROPE_SP_COMPLETE").get_completions(args, begun)
    return [item.value for item in found if item.type == "plain"]


def test_the_shell_completes_a_model() -> None:
    from causalrope_sp.toybox import EMBEDDED

    assert completions("generate", "--model", "") == list(EMBEDDED)
    assert completions("generate", "--model", "toy") == list(EMBEDDED)
    assert completions("generate", "--model", "none") == []
