"""`bench`: what it prints, what it counts, and its floors against planning and torch's FLOP counter."""

from __future__ import annotations

import json
import platform
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from causalrope_sp import CausalVideoPipeline
from causalrope_sp.codec.wan_vae import wan_vae_of
from causalrope_sp.distributed.layout import strategies
from causalrope_sp.heads import HeadPolicy
from causalrope_sp.pipeline import warm_up
from causalrope_sp.planning.decode_cost import VaeSize
from causalrope_sp.profiling import bench as measuring
from causalrope_sp.profiling import environment
from causalrope_sp.sampling.sampler import sample_within_turns
from tests.cli.test_torchrun import torchrun
from tests.support.shell import PROMPT, shell

NAMES = [
    *("load", "first frames, cold", "first frames, warm", "denoise a chunk", "decode a chunk", "CPU time of a step"),
    *("whole video", "realtime factor"),
]
RATE = 1e9  # FLOP/s


@pytest.fixture(scope="module")
def pipe() -> CausalVideoPipeline:
    return CausalVideoPipeline.from_pretrained("toybox", device="cpu")


def rows_of(output: str) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in json.loads(output)["rows"]}


def test_the_table_and_json_agree_and_have_all_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    measure, kept = measuring.measure, list[list[measuring.Row]]()

    def measured_once(*args: Any) -> list[measuring.Row]:
        if not kept:
            kept.append(measure(*args))
        return kept[0]

    def loaded_at_once(*args: Any) -> Any:
        heads = HeadPolicy(((None,) * 6, *((5,) * 6,) * 5))
        return CausalVideoPipeline.from_pretrained("toybox", heads=heads), measuring.Row("load", 0.25, "s")

    monkeypatch.setattr(measuring, "measure", measured_once)
    monkeypatch.setattr(measuring, "load", loaded_at_once)
    monkeypatch.setattr(measuring, "matrix_rate", lambda *_: RATE)
    words = ("bench", PROMPT, "--frames", 21, "--runs", 1, "--weights", "full", "--similar-frames", 2)
    printed = shell(*words, "--json").output
    report, table = json.loads(printed), shell(*words).output
    assert printed.count("\n") == 1
    assert list(rows_of(printed)) == NAMES
    for row, line in zip(report["rows"], table.splitlines()[-len(NAMES) :], strict=True):
        floor = "–" if row["floor"] is None else f"{row['floor']:g}"
        assert line[:20].strip() == row["name"]
        assert line[20:].split() == [f"{row['value']:g}", floor, row["unit"]]
        assert row["value"] > 0
    assert f"torch {torch.__version__}" in table
    assert report["versions"]["torch"] == torch.__version__
    assert report["matrix_flops_per_s"] == {"float32": RATE}
    said = {"weights": "full", "frames": 21, "runs": 1, "model": "toybox", "ranks": 1, "codec": "wan"}
    said |= {"shortened_heads": 30}
    assert report["run"] | said == report["run"]
    assert report["machine"]["memory_bytes"] > 1e8
    assert "None" not in table


def test_floors_are_flops_over_the_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "matrix_rate", lambda *_: RATE)
    plan = json.loads(shell("plan", "--model", "toybox", "--ranks", 1, "--gpu", "cpu", "--json").output)
    rows = rows_of(shell("bench", "--frames", 81, "--runs", 1, "--json").output)
    (alone,) = plan["strategies"]
    assert rows["denoise a chunk"]["floor"] == pytest.approx(1e3 * alone["flops_per_chunk"] / RATE, rel=1e-3)
    vae = wan_vae_of(CausalVideoPipeline.from_pretrained("toybox").codec)
    assert vae is not None
    assert rows["decode a chunk"]["floor"] == pytest.approx(
        1e3 * 3 * VaeSize.of(vae.config).decode_flops(8, 8) / RATE, rel=1e-3
    )
    assert [name for name in NAMES if rows[name]["floor"] is None] == [*NAMES[:3], *NAMES[5:]]
    assert rows["realtime factor"]["value"] == pytest.approx(rows["whole video"]["value"] / 16, rel=1e-3)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_the_flops_of_every_later_chunk_are_those_that_torch_counts(
    guidance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks of a window that fills and of one that slides; the first one's count has the text in it."""
    countable = torch.no_grad()(sample_within_turns.__wrapped__)  # type: ignore[attr-defined]
    monkeypatch.setattr(warm_up, "sample_within_turns", countable)  # in inference mode torch counts no linear layer
    options: dict[str, Any] = {"dtype": "float64", "window": 7, "sink": 0}  # in float32 oneDNN's layers are not counted
    pipe = CausalVideoPipeline.from_pretrained("toybox", device="cpu", guidance_scale=guidance, **options)
    c, branches = pipe.model.config, 1 if guidance == 1 else 2
    a_timestep = 2 * c.dim * (c.freq_dim + c.dim + 6 * c.dim)
    counted = []
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        before = 0
        for part in warm_up.sample_without_text(pipe, 15, pipe.config.sampler):
            counted.append((part.chunk, counter.get_total_flops() - before))
            before = counter.get_total_flops()
    assert [chunk.start for chunk, _ in counted] == [1, 4, 7, 10, 13]
    for chunk, flops in counted[1:]:
        embedded = 2 if chunk.start == 4 else 0  # the first pass that has two chunks of one length
        assert measuring._denoise_flops(pipe, chunk) == flops - branches * embedded * a_timestep


def test_a_step_and_a_steady_chunk_are_what_is_timed(
    pipe: CausalVideoPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clocks that count forwards show what lies between two readings."""
    forwards = 0

    def count(*_: Any) -> None:
        nonlocal forwards
        forwards += 1

    clock = SimpleNamespace(perf_counter=lambda: forwards, process_time=lambda: forwards)
    monkeypatch.setattr(measuring, "time", clock)
    hook = pipe.model.register_forward_hook(count)
    try:
        chunks, steps = measuring._chunk_times(pipe, 69), measuring._step_cpu_times(pipe, 69)
    finally:
        hook.remove()
    assert [seconds for _, seconds in chunks] == [4] * 6
    assert [seconds for _, seconds in steps] == [1] * 6
    assert [chunk.start for chunk, _ in measuring._steady_chunks(pipe, chunks)] == [13, 16]
    assert measuring._steady_chunks(pipe, chunks[:2]) == chunks[1:2]  # the window never fills: the last one


@pytest.mark.parametrize("graphs", [True, False])
def test_the_warm_up_captures_graphs_only_if_the_videos_do(graphs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[torch.device]()
    monkeypatch.setattr("causalrope_sp.sampling.chunk_loop.stream_graphs", lambda device, _: asked.append(device))
    CausalVideoPipeline.from_pretrained("toybox", device="cpu", graphs=graphs).warm_up()
    assert asked == [torch.device("cpu")] * graphs


def test_a_matrix_rate_is_that_of_the_fastest_warm_product(monkeypatch: pytest.MonkeyPatch) -> None:
    readings = iter([0, 1, 10, 14, 20, 23, 30, 32])  # 1 s the first, which is not counted, then 4, 3 and 2 s
    monkeypatch.setattr(measuring, "time", SimpleNamespace(perf_counter=lambda: next(readings)))
    monkeypatch.setattr(measuring, "SIDES", {"cpu": 8})
    monkeypatch.setattr(measuring, "PRODUCTS", 3)
    assert measuring.matrix_rate(torch.device("cpu"), torch.bfloat16) == 2 * 8**3 / 2


def test_two_ranks_print_once() -> None:
    done = torchrun("bench", "--frames", 33, "--runs", 1, "--json")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    report = json.loads(done.stdout)
    assert report["run"]["ranks"] == 2
    assert report["run"]["strategy"] in strategies(2, 6)
    assert list(rows_of(done.stdout)) == NAMES


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--frames", "0"], "--frames must be a whole number of at least 1, not 0"),
        (["--runs", "0"], "0 is not in the range"),
        (["--model", "nowhere"], "no model 'nowhere'"),
        (["--model", "toybox-vin"], "toybox-vin makes its chunks in parallel, and bench measures streams"),
        (["--height", "60"], "height 60 is not divisible by 16"),
        (["--steps", "1000,x"], "--steps takes a count or a list"),
        (["--attention", "magic"], "attention must be one of auto, torch, triton"),
        (["--device", "tpu"], "device must be"),
        (["a pink circle"], "unknown word 'pink'"),
    ],
)
def test_wrong_input_is_one_line_and_status_2(words: list[str], reason: str) -> None:
    result = shell("bench", *words, "--json")
    assert (result.exit_code, result.output.count("\n")) == (2, 1), result.output
    assert result.output.startswith("error: ")
    assert reason in result.output


def test_the_commit_is_that_of_the_checkout(tmp_path: Path) -> None:
    def git(*words: str) -> str:
        own = ("-c", "user.name=a", "-c", "user.email=a@b", "-C", str(tmp_path))
        return subprocess.run(["git", *own, *words], check=True, capture_output=True, text=True).stdout.strip()

    git("init")
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("commit", "-m", "a")
    git("tag", "v1")
    head = git("rev-parse", "HEAD")[:12]
    assert environment.commit(tmp_path) == head
    (tmp_path / "a").write_text("2")
    assert environment.commit(tmp_path) == f"{head}-dirty"
    (tmp_path / "site-packages").mkdir()
    assert environment.commit(tmp_path / "site-packages") is None


def test_machines_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nmodel name\t: A CPU: fast\nprocessor\t: 1\nmodel name\t: A CPU: fast\n")
    assert environment.cpu_name(cpuinfo) == "A CPU: fast"
    assert environment.cpu_name(tmp_path / "none") == platform.machine()
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 570.1\necho 570.1\n")
    smi.chmod(0o755)
    found = SimpleNamespace(name="NVIDIA H100", total_memory=80)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: found)
    expected = {"device": "NVIDIA H100", "memory_bytes": 80, "driver": None}
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    assert environment.machine_fields(torch.device("cuda")) == {**expected, "driver": "570.1"}
    smi.unlink()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert environment.machine_fields(torch.device("cuda")) == expected
