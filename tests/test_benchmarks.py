"""The benchmarks run: their gates pass where there is no GPU, and what needs one says so in a line."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from causalrope_sp import LatentGrid
from causalrope_sp.cache.window import SlidingWindow
from causalrope_sp.sampling.pass_graphs import PassGraphs
from tests.support.cpu_graph import capture_on_cpu

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
without_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")


def run(script: str, *options: str) -> subprocess.CompletedProcess[str]:
    """On one thread, and without what this process set for its own kernels."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(BENCHMARKS / script), *options]
    return subprocess.run(command, capture_output=True, text=True, env=environment | {"OMP_NUM_THREADS": "1"})


def last_line(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_what_json_lacks_is_null(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """As the PSNR of equal videos is."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    importlib.import_module("printed").finish("a", rows=[{"psnr_db": float("inf"), "keys": (0.5, float("nan"))}])
    assert json.loads(capsys.readouterr().out)["rows"] == [{"psnr_db": None, "keys": [0.5, None]}]


def test_every_operation_passes_its_gate() -> None:
    found = last_line(run("kernel_suite.py", "--gate-only"))
    assert found["passed"]
    assert all(verdict["passed"] for verdict in found["gate"])
    judged = {(verdict["operation"], verdict["ranks"]) for verdict in found["gate"]}
    for ranks in (1, 3):
        names = {name for name, count in judged if count == ranks}
        assert {"gate, modulate", "rms norm", "q, k, v to q and ring", "linear, gelu", "cross-attention"} <= names
        assert {"attention, full ring", "attention, 2 ranges", "attention, keys rotated on read", "merge of 2"} <= names
    across = "q, k, v to send buffer", "pieces to q and ring", "pieces to ring", "tokens to pieces"
    assert {(name, 3) for name in (*across, "merge of 3 as they arrive")} <= judged


def test_a_server_is_measured() -> None:
    short = ("--seconds", "1", "--opened", "2", "--nonsense", "20", "--most", "1", "--lead", "0.1")
    found = last_line(run("serve.py", *short, "--rounds", "1", "--chunks", "4"))
    assert found["sustained"][0][2] > 0
    assert found["malformed"]["messages_refused"] == 10
    for media in ("mp4", "jpeg"):
        assert found[f"processor_s_{media}"]["session"] > 0
        assert found[f"processor_s_{media}"]["encoding"] > 0
    for carrier in ("websocket", "webrtc"):
        assert found[f"{carrier}_lead_0.1_s"]["changes"] > 0


def test_open_colors_are_told_where_there_is_little_noise() -> None:
    """By two chunks of one scene; one chunk is refused."""
    found = last_line(run("vin_ladder.py", "--scenes", "1", "--draws", "1", "--frames", "37"))["right"]
    assert set(found) == {"0.99", "0.98", "0.97", "0.95", "0.9", "0.8"}
    assert found["0.8"]["whole video"] == found["0.8"]["keyframes and last chunk"] == found["0.8"]["last chunk"] == 1
    assert run("vin_ladder.py", "--frames", "33").returncode == 2


def test_toybox_is_judged_at_both_lengths() -> None:
    """A long video is judged of every prompt that asks for one, however few short ones there are."""
    short = ("--prompts", "1", "--frames", "17", "--long-prompts", "2", "--long-frames", "17")
    found = last_line(run("toybox_quality.py", *short, "--json"))
    assert (found["objects"], found["long_objects"]) == (2, 4)
    assert found["goals"]["long_color"] == 0.95
    assert found["truth"]["rendered"]["color"] == 1
    steered = last_line(run("toybox_steering.py", "--count", "1"))
    assert {steered["prompts"], steered["images"]} <= {0, 1}


def test_the_speed_of_two_models_is_compared() -> None:
    found = last_line(run("toybox_speed.py", "--frames", "17", "--runs", "2", "--against", "toybox-flow"))
    assert len(found["processor_time_ratios"]) == 2
    assert max(found["processor_time_ratios"]) < 1, "four steps against sixteen"


def test_only_the_variants_and_texts_that_are_asked_for_are_compared() -> None:
    few = ("--prompts", "1", "--lengths", "64", "--ranks", "", "--variants", "VIN", "--open", "nothing,colours")
    found = last_line(run("vin.py", *few))
    assert [(row["variant"], row["open"], row["judged"] is None) for row in found["rows"]] == [
        ("VIN", "nothing", False),
        ("VIN", "colours", True),  # where the text names no colour, none is right or wrong
    ]
    assert (found["seconds"], found["held_out"]) == ([], [])
    for words, message in ((("--open", "shapes"), "not 'shapes'"), (("--lengths", ""), "--lengths have at least 64")):
        refused = run("vin.py", *words)
        assert refused.returncode == 2
        assert message in refused.stderr


def test_wide_parameters_embed_the_time_better() -> None:
    found = last_line(run("mixed_dtypes.py", "--seeds", "1", "--layers", "1"))
    assert len(found["rows"]) == 3
    assert all(row["time_wide"] < row["time_narrow"] for row in found["rows"])


def test_a_format_loads_in_the_memory_of_the_model(tmp_path: Path) -> None:
    options = "--layers", "1", "--runs", "1", "--folder", str(tmp_path), "--format", "scaled fp8"
    (row,) = last_line(run("load_formats.py", *options))["rows"]
    assert row["memory_of_model"] < 1.5  # of one layer of 30, so a matrix weighs more
    assert row["ratio"] > 0


@pytest.mark.parametrize("name", ["Wan 2.2 5B", "LoKr"])
def test_a_layout_or_an_adapter_passes_its_gate(tmp_path: Path, name: str) -> None:
    (row,) = last_line(
        run("load_formats.py", "--layers", "1", "--runs", "1", "--folder", str(tmp_path), "--format", name)
    )["rows"]
    assert row["format"] == name
    assert row["ratio"] > 0


def test_the_tests_of_all_situations_exist() -> None:
    found = last_line(run("file_situations.py", "--list"))
    assert found["situations"] >= 31
    one = last_line(run("file_situations.py", "--list", "--section", "adapters"))
    assert 0 < one["situations"] < found["situations"]


def test_a_lora_is_merged_or_computed_beside() -> None:
    found = last_line(run("live_lora.py", "--rank", "4", "--tokens", "16", "--rounds", "1"))
    assert found["block"]["change"] > 0
    assert found["toybox"]["chunk"] > 0


@without_cuda
@pytest.mark.parametrize("script", ["kernel_suite.py", "pass.py"])
def test_times_need_cuda(script: str) -> None:
    done = run(script)
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1
    assert "CUDA" in done.stderr


def test_floors_need_no_gpu() -> None:
    """A copy of 4·T·D bfloat16 numbers, and a product, by hand."""
    options = "--model", "wan2.1-1.3b", "--ranks", "1", "--bandwidth", "4.3e12", "--matmul", "790e12"
    found = last_line(run("kernel_suite.py", "--floors", *options))
    floors = {floor["operation"]: floor["floor_us"] for floor in found["floors"]}
    assert floors["gate, modulate"] == pytest.approx(4 * 4680 * 1536 * 2 / 4.3e6)
    assert floors["linear, gelu"] == pytest.approx(2 * 4680 * 1536 * 8960 / 790e6)
    (one,) = found["passes"]
    assert one["memory_ms"] == pytest.approx((2 + 30 * (4 + 4 + 4 + 2 + 6)) * 4680 * 1536 * 2 / 4.3e9)
    assert run("kernel_suite.py", "--floors").returncode == 2


def test_a_pass_and_a_step_run() -> None:
    found = last_line(run("pass.py", "--smoke"))
    assert found["smoke"]
    assert found["gate"]["passed"]
    rows = {(row["window"], row["what"], row["variant"]): row for row in found["rows"]}
    for window in ("empty", "full"):
        assert (window, "one denoise pass", "eager") in rows
        assert {(window, "autoregressive step", way) for way in ("fused", "separate")} <= rows.keys()
    assert all(row["ms"] > 0 and row["of_roofline"] is None for row in rows.values())


def test_a_pass_by_a_graph_is_timed_behind_a_full_window(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the stand-in of the tests, in place of CUDA's graphs."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import pass_cases

    graphs = [PassGraphs(capture_on_cpu, torch.device("cpu")) for _ in range(2)]
    monkeypatch.setattr(pass_cases, "stream_graphs", lambda device: graphs.pop())
    assert pass_cases.gate(torch.device("cpu"), torch.float32).errors.keys() == {"eager", "graph", "fused"}
    model = pass_cases.random_model(pass_cases.SMALL, torch.device("cpu"), torch.float32)
    setup = pass_cases.Setup.random(model, LatentGrid(2, 2), SlidingWindow(6))
    assert [name for name, _ in pass_cases.variants(setup, setup.tokens(0), setup.tokens(3))] == ["eager"]
    x = setup.tokens(3)
    assert not pass_cases.differ(x, x + 1e-8, torch.float32)
    assert pass_cases.differ(x, x + 1e-3, torch.float32)
    assert pass_cases.differ(x * torch.nan, x, torch.float32)


def test_every_way_to_decode_passes_its_gate() -> None:
    found = last_line(run("decode.py", "--vae", "toybox", "--runs", "3", "--ranks", "2", "--chunks", "3"))
    assert [(row["vae"], row["pixels"]) for row in found["decoders"]] == [("toybox", "64x64")]
    assert 0 < found["decoders"][0]["median_ratio"] <= 0.6
    assert [row["variant"] for row in found["rows"]] == ["inline", "overlap", "spatial", "1 decode ranks"]


def test_sparse_attention_passes_its_gates() -> None:
    """The shares of the published split by hand: 129 of 348 heads see 5 of 21 frames, 12 more all, the others 11."""
    few = "--prompts", "1", "--frames", "25", "--windows", "mass=0.8", "--similar", "0", "--summed", "mass=0.8", "0"
    found = last_line(run("sparse.py", *few, "--oracles", "0.5", "--random", "wan2.1-1.3b"))
    rows = {row["option"]: row for row in found["rows"]}
    assert rows["cache=int8"]["psnr_db"] >= 45
    sparse = [row for row in found["rows"] if row.get("series") not in (None, "8 bits")]
    assert len(sparse) == 11
    assert all(0.4 < row["keys"] < 1 and 15 < row["psnr_db"] < 60 for row in sparse)
    assert max(row["error"] for row in found["exact"]) < 1e-9 < min(row["change"] for row in found["exact"])
    both = next(row for row in found["full_size"] if row["policy"] == "published split, dynamic heads 11 frames, int8")
    assert both["attention_flops"] == pytest.approx((12 * 21 + 129 * 5 + 219 * 11) / (360 * 21))
    assert both["cache"] < 0.3


def test_windows_and_bands_of_heads_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand: 6 heads see 21 frames, 3 see 5, 3 see 10 of 16 pairs of rows of 21; an undo buffer has 3 frames."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import heads

    monkeypatch.setattr(heads, "GRID", LatentGrid(4, 2))
    few = "--layers", "2", "--ffn", "8", "--passes", "1", "--share", "0.5", "--rows", "1"
    found = json.loads(CliRunner().invoke(heads.main, few, catch_exceptions=False).output)
    assert found["attention_flops"] == pytest.approx((6 * 21 + 3 * 5 + 3 * 21 * 10 / 16) / (12 * 21), abs=1e-4)
    assert found["cache_bytes"] == pytest.approx((9 * 24 + 3 * 8) / (12 * 24), abs=1e-4)
    assert min(found["seconds"].values()) > 0


def test_what_reuse_saves_needs_no_run() -> None:
    """Calls by hand: 40 layers, 2 a layer for ulysses, 30 passes of which every other one in the window reuses, and a
    gather of the latents."""
    found = last_line(run("reuse.py", "--formulas"))
    rows = {(r["model"], r["steps"], r["ranges"], r["strategy"]): r for r in found["full_size"]}
    row = rows["wan2.1-14b", 30, "2/4/6", "ulysses"]
    levels = [5 * s / (1 + 4 * s) for s in ((30 - n) / 30 for n in range(30))]
    hits = sum(n % 2 for n, level in enumerate(levels) if 100 < 1000 * level < 850)
    assert row["calls"] == [40 * 2 * 30 + 1, 40 * 2 * (30 - hits) + 1]
    assert 0 < row["flops_saved"] < row["bytes_saved"] < 0.5
    assert found["rows"] == []
