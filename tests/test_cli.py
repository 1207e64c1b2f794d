from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import text_files as files
from click.testing import CliRunner, Result
from PIL import Image

from causalrope_sp.cli.main import cli
from causalrope_sp.cli.runtime import AHEAD, Background
from causalrope_sp.distributed import strategies
from causalrope_sp.text import load_embeds

MODEL = "toybox"
PROMPT = "a red circle slides right"
ROOT = Path(__file__).parents[1]
StartEndless = Callable[..., subprocess.Popen[str]]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
KEYS = ["frames", "height", "width", "fps_generated", "first_frame_s", "seconds", "ranks", "strategy", "out", "chunks"]
KEYS += ["communication", "stored_bytes"]


def shell(*words: object) -> Result:
    return CliRunner().invoke(cli, [str(word) for word in words])


def run(*words: object, command: tuple[str, ...] = (sys.executable, "-m", "causalrope_sp")) -> Any:
    line = [*command, *map(str, words)]
    return subprocess.run(line, capture_output=True, text=True, timeout=120, cwd=ROOT)


def torchrun(*words: object) -> Any:
    return run(*words, command=(*TORCHRUN, "-m", "causalrope_sp"))


@pytest.fixture
def start_endless() -> Iterator[StartEndless]:
    """Starts a run that would take hours and returns when its first frames are on the disk; ends what is left of it."""
    started: list[subprocess.Popen[str]] = []

    def start(out: Path, command: list[str], *options: str, prompt: str = PROMPT) -> subprocess.Popen[str]:
        return _start_endless(out, command, [prompt, *options], started)

    yield start
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _start_endless(
    out: Path, command: list[str], words: list[str], started: list[subprocess.Popen[str]]
) -> subprocess.Popen[str]:
    line = [*command, "-m", "causalrope_sp", "generate", *words, "--frames", "100000", "--window", "9"]
    line += ["--model", MODEL, "--out", str(out)]
    process = subprocess.Popen(
        line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, start_new_session=True
    )
    started.append(process)
    deadline = time.monotonic() + 120
    while not any(part.stat().st_size > 1000 for part in out.parent.glob(".*.part")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return process


def frames_in(path: Path) -> int:
    with av.open(str(path)) as container:
        return sum(1 for _ in container.decode(video=0))


def pictures(folder: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(name)) for name in sorted(folder.glob("*.png"))]).astype(float)


def test_help_names_the_commands() -> None:
    result = shell("--help")
    assert result.exit_code == 0
    assert all(name in result.output for name in ("generate", "inspect", "verify", "torchrun"))


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
        (["generate", PROMPT, "--frames", "0"], "frames must be at least 1, not 0"),
        (["generate", PROMPT, "--frames", "many"], "'many' is not a valid integer"),
        (["generate", PROMPT, "--seed", "-1"], "-1 is not in the range"),
        (["generate", PROMPT, "--steps", "1000,x"], "--steps takes a count or a list"),
        (["generate", PROMPT, "--steps", "0"], "steps must be at least 1"),
        (["generate", PROMPT, "--steps", "250,1000"], "steps must fall"),
        (["generate", PROMPT, "--window", "1"], "window 1 is smaller than chunk + sink"),
        (["generate", PROMPT, "--sink", "-1"], "sink must be"),
        (["generate", PROMPT, "--attention", "magic"], "attention must be one of auto, torch, triton"),
        (["generate", PROMPT, "--timeout", "nan"], "a timeout must be above 0 and at most"),
        (["generate", PROMPT, "--timeout", "0"], "a timeout must be above 0 and at most"),
        (["generate", PROMPT, "--steps", "100000000000"], "steps must be at least 1 and at most 1000"),
        (["generate", PROMPT, "--strategy", "magic"], "unknown strategy 'magic'"),
        (["generate", PROMPT, "--model", "nowhere"], "no model 'nowhere'"),
        (["generate", PROMPT, "--out", "x.avi"], "must end in .mp4, .mov, .webm, .gif, .webp, or in /"),
        (["generate", PROMPT, "--out", "none/x.mp4"], "there is no folder none"),
        (["generate", PROMPT, "--image", "none.png"], "File 'none.png' does not exist"),
        (["generate", PROMPT, "--image", __file__], "not a picture of a known kind"),
        (["generate", PROMPT, "--image", __file__, "--video", __file__], "give either an image or a video, not both"),
        (["generate", PROMPT, "--continue"], "continuing needs a video"),
        (["generate", PROMPT, "--strength", "0.5"], "a strength needs a video"),
        (["generate", PROMPT, "--video", __file__], "either continued or, with a strength, redrawn"),
        (["generate", PROMPT, "--video", __file__, "--continue", "--strength", "1"], "either continued or"),
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
    assert errors == f"stopped: {frames} of 100000 frames are in {out}\n"
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


def test_two_ranks_make_the_same_video_as_one(tmp_path: Path) -> None:
    words = ("generate", PROMPT, "--model", MODEL, "--frames", 30, "--json", "--out")
    one = json.loads(shell(*words, f"{tmp_path}/one/").output)
    done = torchrun(*words, f"{tmp_path}/two/")
    assert done.returncode == 0, done.stderr
    two = json.loads(done.stdout.splitlines()[-1])
    assert (one["ranks"], two["ranks"], len(done.stdout.splitlines())) == (1, 2, 1)
    assert two["strategy"] in strategies(2, 6)
    assert one["communication"] == {}
    assert two["communication"]["latents"]["calls"] == len(two["chunks"])
    assert all(kind["bytes"] > 0 for name, kind in two["communication"].items() if name != "agreement")
    error = np.mean((pictures(tmp_path / "one") - pictures(tmp_path / "two")) ** 2)
    assert error < 255**2 / 10**6  # PSNR > 60 dB


def test_a_decode_rank_makes_the_same_video(tmp_path: Path) -> None:
    words = ("generate", PROMPT, "--model", MODEL, "--frames", 30, "--json", "--out")
    assert shell(*words, f"{tmp_path}/one/", "--decode", "overlap").exit_code == 0
    done = torchrun(*words, f"{tmp_path}/two/", "--decode-ranks", 1)
    assert done.returncode == 0, done.stderr
    moved = json.loads(done.stdout)["communication"]
    assert moved["pixels"]["bytes"] == 30 * 64 * 64 * 3 + 3 * 4 * 8  # frames, and a head a chunk
    error = np.mean((pictures(tmp_path / "one") - pictures(tmp_path / "two")) ** 2)
    assert error < 255**2 / 10**6
    wrong = torchrun(*words, f"{tmp_path}/three/", "--decode-ranks", 2)
    assert (wrong.returncode, wrong.stdout) != (0, "")
    assert "error: 2 decode ranks leave none of 2 ranks to denoise" in wrong.stderr


def test_embeddings_that_were_encoded_make_the_video_of_their_prompt(tmp_path: Path) -> None:
    file = tmp_path / "e.safetensors"
    written = json.loads(shell("encode", PROMPT, "--seed", 4, "--out", file, "--json").output)
    assert written.pop("seconds") >= 0
    assert written == {
        "prompt": PROMPT,
        "encoder": "toybox",
        "length": 2,
        "shape": [1, 3, 51],
        "dtype": "float32",
        "out": str(file),
    }
    words = ("--model", MODEL, "--frames", 5, "--seed", 4, "--json", "--out")
    assert shell("generate", PROMPT, *words, f"{tmp_path}/a/").exit_code == 0
    assert shell("generate", "--text-embeds", file, *words, f"{tmp_path}/b/").exit_code == 0
    assert np.array_equal(pictures(tmp_path / "a"), pictures(tmp_path / "b"))
    done = torchrun("generate", "--text-embeds", file, *words, f"{tmp_path}/c/")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["communication"]["text"]["calls"] == 1
    assert np.mean((pictures(tmp_path / "a") - pictures(tmp_path / "c")) ** 2) < 255**2 / 10**6


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


def test_under_torchrun_only_rank_0_speaks_of_wrong_input(tmp_path: Path) -> None:
    done = torchrun("generate", PROMPT, "--model", MODEL, "--window", 1, "--out", tmp_path / "a.mp4")
    assert done.returncode != 0
    assert done.stderr.count("window 1 is smaller than") == 1
    assert [line.split()[2] for line in done.stderr.splitlines() if "exitcode  :" in line] == ["2", "2"]
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="finds the ranks' processes in /proc")
def test_a_rank_that_dies_ends_the_other(tmp_path: Path, start_endless: StartEndless) -> None:
    out = tmp_path / "a.mp4"
    process = start_endless(out, TORCHRUN)
    ranks = ranks_of(process.pid)
    assert sorted(ranks) == [0, 1]
    killed = time.monotonic()
    os.kill(ranks[1], signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert time.monotonic() - killed < 30
    assert process.returncode != 0
    assert f"Signal 9 (SIGKILL) received by PID {ranks[1]}" in errors
    assert not any(os.path.exists(f"/proc/{pid}") for pid in ranks.values())
    assert frames_in(out) > 0


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="finds the ranks' processes in /proc")
def test_a_rank_that_is_stopped_is_named_and_ends_the_other(tmp_path: Path, start_endless: StartEndless) -> None:
    out = tmp_path / "a.mp4"
    process = start_endless(out, TORCHRUN, "--timeout", "8")
    ranks = ranks_of(process.pid)
    os.kill(ranks[1], signal.SIGSTOP)
    _, errors = process.communicate(timeout=90)  # torchrun gives the stopped one half a minute before it kills it
    assert process.returncode != 0
    assert "error: rank 1 has not been heard of for 8 s: it is gone, or stopped" in errors
    assert not any(os.path.exists(f"/proc/{pid}") for pid in ranks.values())
    assert frames_in(out) > 0


def test_an_interrupted_torchrun_keeps_the_frames_so_far(tmp_path: Path, start_endless: StartEndless) -> None:
    process = start_endless(tmp_path / "a.mp4", TORCHRUN)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does it: the launcher and every rank
    process.communicate(timeout=30)
    assert frames_in(tmp_path / "a.mp4") > 0
    assert os.listdir(tmp_path) == ["a.mp4"]


def ranks_of(launcher: int) -> dict[int, int]:
    """Process ids by rank."""
    found = {}
    for pid in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        variables = Path(f"/proc/{pid}/environ").read_text().split("\0")
        found.update({int(v.removeprefix("RANK=")): int(pid) for v in variables if v.startswith("RANK=")})
    return found


def test_inspect_tells_what_a_checkpoint_is(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    from causalrope_sp.pipeline.model_config import ModelConfig
    from causalrope_sp.toybox import WEIGHTS

    weights = ModelConfig.load(WEIGHTS / "toybox.json").transformer
    text, plain = shell("inspect", weights), shell("inspect", weights, "--json")
    assert (text.exit_code, plain.exit_code) == (0, 0), text.output
    report = json.loads(plain.output)
    assert {"path", "layout", "config", "dtype", "parameters", "missing", "unexpected"} <= set(report)
    assert (report["missing"], report["unexpected"]) == ([], [])
    assert f"{report['parameters']:,}" in text.output
    save_file({"nonsense": torch.zeros(3)}, tmp_path / "other.safetensors")
    assert shell("inspect", tmp_path / "other.safetensors").exit_code == 2


@pytest.mark.parametrize(("verdicts", "status"), [([True, None], 0), ([True, False], 1)])
def test_verify_prints_its_checks(verdicts: list[bool | None], status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from causalrope_sp.verification.runner import Check

    checks = [Check(f"case{i}", i + 1, "ulysses", [1e-7, float("nan")][i], ok, "") for i, ok in enumerate(verdicts)]
    monkeypatch.setattr("causalrope_sp.verification.runner.run_verification", lambda *_: checks)
    result = shell("verify", "--json")
    assert result.exit_code == status
    assert json.loads(result.output) == [
        {"case": "case0", "ranks": 1, "strategy": "ulysses", "error": 1e-7, "ok": True},
        {"case": "case1", "ranks": 2, "strategy": "ulysses", "error": None, "ok": verdicts[1]},
    ]
    table = shell("verify").output
    assert "case1" in table
    assert "1 of 2 checks passed" in table


def test_verify_starts_its_own_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = shell("verify")
    assert (result.exit_code, result.output) == (
        2,
        "error: verify starts its own processes: run it without torchrun\n",
    )


def test_background_work_keeps_order_and_passes_errors_on() -> None:
    def numbers() -> Iterator[int]:
        yield from range(9)
        raise KeyError("end")

    seen = []
    with pytest.raises(KeyError, match="end"):
        seen.extend(Background(numbers))
    items = iter(Background(numbers))
    assert [next(items) for _ in range(9)] == list(range(9))


def test_background_work_stops_when_nobody_listens() -> None:
    made = []

    def endless() -> Iterator[int]:
        while True:
            made.append(threading.current_thread())
            yield len(made)

    items = iter(Background(endless))
    assert next(items) == 1
    items.close()  # type: ignore[attr-defined]
    made[0].join(timeout=10)
    assert not made[0].is_alive()
    assert len(made) <= AHEAD + 2


def test_what_fails_elsewhere_ends_background_work() -> None:
    def stuck() -> Iterator[int]:
        yield 1
        threading.Event().wait()

    work = Background(stuck)
    items = iter(work)
    assert next(items) == 1
    threading.Timer(0.1, work.fail, [KeyError("lost")]).start()
    with pytest.raises(KeyError, match="lost"):
        next(items)


def test_the_plain_example_runs(tmp_path: Path) -> None:
    done = run(PROMPT, tmp_path / "a.mp4", 11, command=(sys.executable, "examples/generate.py"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(f"11 frames in {tmp_path}/a.mp4\n")
    assert frames_in(tmp_path / "a.mp4") == 11


def test_the_torchrun_example_runs(tmp_path: Path) -> None:
    done = run(PROMPT, tmp_path / "a.mp4", 11, command=(*TORCHRUN, "examples/stream_sp.py"))
    assert done.returncode == 0, done.stderr
    assert f"11 frames from 2 ranks in {tmp_path}/a.mp4" in done.stdout
    assert frames_in(tmp_path / "a.mp4") == 11
