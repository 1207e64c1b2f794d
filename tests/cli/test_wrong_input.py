"""Wrong input is one line and status 2, before anything is loaded."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from tests.support.shell import PROMPT, shell


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ([], "Missing command"),
        (["paint"], "No such command 'paint'"),
        (["generate"], "Missing argument 'PROMPT'"),
        (["generate", PROMPT, "--colour"], "No such option"),
        (["generate", PROMPT, "--text-embeds", "e.safetensors"], "give either a prompt or --text-embeds, not both"),
        (["generate", "--text-embeds", "nowhere.safetensors"], "nowhere.safetensors: no such file"),
        (["encode"], "Missing argument 'PROMPT'"),
        (["encode", "a pink circle slides right"], "unknown word 'pink'"),
        (["encode", PROMPT, "--text", "nowhere"], "no text encoder at nowhere: no such file or folder"),
        (["encode", PROMPT, "--text", "nowhere", "--model", "toybox"], "give either --model or --text, not both"),
        (["encode", PROMPT, "--tokenizer", "nowhere"], "--tokenizer goes with --text"),
        (["encode", PROMPT, "--out", "none/e.safetensors"], "cannot write none/e.safetensors"),
        (["encode", PROMPT, "--out", "."], "cannot write .: it is a folder"),
        (["generate", "a pink circle slides right"], "unknown word 'pink'"),
        (["serve", "--host", "0.0.0.0"], "token must be set for host 0.0.0.0, which other machines can reach"),
        (["serve", "--token", "short"], "token must be at least 16 letters, digits, -, . and _"),
        (["serve", "--port", "65536"], "65536 is not in the range"),
        (["serve", "--lead-seconds", "0"], "lead_seconds must be"),
        (["serve", "--host", "256.1.1.1", "--token", "a" * 16], "cannot listen at 256.1.1.1, port 8000"),
        (["generate", PROMPT, "--frames", "0"], "--frames must be a whole number of at least 1, not 0"),
        (["generate", PROMPT, "--frames", "many"], "'many' is not a valid integer"),
        (["generate", PROMPT, "--seed", "-1"], "-1 is not in the range"),
        (["generate", PROMPT, "--steps", "1000,x"], "--steps takes a count or a list"),
        (["generate", PROMPT, "--steps", "0"], "num_inference_steps must be a whole number of at least 1"),
        (["generate", PROMPT, "--steps", "250,1000"], "steps must fall"),
        (["generate", PROMPT, "--window", "1"], "window 1 is smaller than chunk + sink"),
        (["generate", PROMPT, "--sink", "-1"], "sink must be"),
        (["generate", PROMPT, "--attention", "magic"], "attention must be one of auto, torch, triton"),
        (["generate", PROMPT, "--timeout", "nan"], "a timeout must be above 0 and at most"),
        (["generate", PROMPT, "--timeout", "0"], "a timeout must be above 0 and at most"),
        (["generate", PROMPT, "--steps", "100000000000"], "at least 1 and at most 1000, not 100000000000"),
        (["generate", PROMPT, "--strategy", "magic"], "unknown strategy 'magic'"),
        (["generate", PROMPT, "--model", "nowhere"], "no model 'nowhere'"),
        (["generate", PROMPT, "--out", "x.avi"], "must end in .mp4, .mov, .webm, .gif, .webp, or in /"),
        (["generate", PROMPT, "--out", "none/x.mp4"], "there is no folder none"),
        (["generate", PROMPT, "--image", "none.png"], "File 'none.png' does not exist"),
        (["generate", PROMPT, "--image", __file__], "not a picture of a known kind"),
        (["generate", PROMPT, "--image", __file__, "--video", __file__], "give either --image or --video, not both"),
        (["generate", PROMPT, "--continue"], "--continue needs a --video"),
        (["generate", PROMPT, "--strength", "0.5"], "--strength needs a --video"),
        (["generate", PROMPT, "--video", __file__], "either continued (--continue) or redrawn (--strength)"),
        (
            ["generate", PROMPT, "--video", __file__, "--continue", "--strength", "1"],
            "either continued (--continue) or",
        ),
        (
            ["generate", PROMPT, "--video", __file__, "--strength", "2"],
            "strength must be above 0 and at most 1, not 2.0",
        ),
        (["generate", PROMPT, "--codec", "mp3"], "'mp3' is not one of 'wan', 'taehv'"),
        (["generate", PROMPT, "--codec", "taehv"], "holds a wan codec, not taehv"),
        (["generate", PROMPT, "--codec-weights", __file__], "cannot read the codec"),
        (["inspect"], "Missing argument 'PATH'"),
        (["inspect", "nowhere"], "nowhere"),
        (["verify", "nowhere"], "'nowhere' does not exist"),
        (["verify", "--ranks", "1,x"], "--ranks takes numbers of processes"),
        (["verify", "--ranks", "0"], "rank"),
        (["verify", "--ranks", "1_0"], "--ranks takes numbers of processes like 1,2,3, at most 64, not '1_0'"),
        (["verify", "--ranks", "9" * 5000], "--ranks takes numbers of processes"),
        (["verify", "--device", ""], "'' is not one of 'cpu', 'cuda'"),
        (["encode", PROMPT, "--text", "x" * 300], "File name too long"),
        (["encode", PROMPT, "--out", "x" * 300], "File name too long"),
        (["inspect", "x" * 300], "File name too long"),
        (["plan", "--model", "x" * 300], "File name too long"),
        (["plan", "--model", "toybox", "--width", "2"], "width 2 is not divisible by 16"),
        (["generate", PROMPT, "--width", "2"], "width 2 is not divisible by 16"),
        (["bench", PROMPT, "--height", "1"], "height 1 is not divisible by 16"),
        (["profile-reuse", PROMPT, "--out", "x" * 300], "File name too long"),
        (["verify", "--strategy", "magic"], "unknown strategy 'magic'"),
        (["verify", "--dtype", "int8"], "'int8' is not one of"),
    ],
)
def test_wrong_input_is_one_line_and_status_2(
    words: list[str], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = shell(*words)
    assert result.exit_code == 2, result.output
    assert result.output.startswith("error: ")
    assert result.output.count("\n") == 1
    assert reason in result.output
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("words", [["a pink circle"], [PROMPT, "--frames", "0"], [PROMPT, "--out", "x.avi"]])
def test_wrong_input_is_found_before_anything_is_loaded(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: Any, **__: Any) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr("causalrope_sp.pipeline.pipeline.CausalVideoPipeline.from_pretrained", load)
    assert shell("generate", *words).exit_code == 2
