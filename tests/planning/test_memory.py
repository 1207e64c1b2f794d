"""What waits elsewhere, and what is refused before it is loaded."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

from causalrope_sp import CausalVideoPipeline, CheckpointError, ConfigError, LatentGrid
from causalrope_sp.cli.main import cli
from causalrope_sp.codec import load_codec
from causalrope_sp.codec.codec_footprint import CodecFootprint, published_footprint
from causalrope_sp.codec.offloaded_codec import OffloadedCodec
from causalrope_sp.codec.wan_vae_config import WAN_2_1
from causalrope_sp.config import PRESETS
from causalrope_sp.pipeline import free_memory, loading, preflight
from causalrope_sp.pipeline.free_memory import available_memory, left_in_cgroup
from causalrope_sp.pipeline.model_config import ModelConfig
from causalrope_sp.pipeline.offload import Offload
from causalrope_sp.pipeline.preflight import Run, check_fits, remedies
from causalrope_sp.planning.cost import plan
from causalrope_sp.planning.machines import machine
from causalrope_sp.planning.workload import Workload
from causalrope_sp.reuse.policy import ReusePlan
from causalrope_sp.text import TextSource
from causalrope_sp.text.text_footprint import text_bytes, umt5_parameters, umt5_xxl_bytes
from causalrope_sp.toybox import WEIGHTS
from causalrope_sp.weights import load_model
from tests.support import text_files as files
from tests.support.paths import ROOT
from tests.support.reuse_cases import MIXED
from tests.support.videos import video_of
from tests.support.watching import noted

PROMPT = "a red circle slides right"
GB = 10**9
WORK = Workload(PRESETS["wan2.1-1.3b"], LatentGrid.from_pixels(480, 832, 8), window=21, chunk_frames=3, steps=4)
ALONE = Run(
    WORK,
    ranks=1,
    strategy="auto",
    machine=machine("rtx4090", "pcie"),
    offload=Offload("device"),
    text=umt5_xxl_bytes(),
    codec=published_footprint(WAN_2_1, 480, 832, 3),
    least_window=3,
    on_cpu=False,
)
PRESET = replace(ALONE, offload=Offload("free"))
LARGE = replace(PRESET, work=replace(WORK, config=PRESETS["wan2.1-14b"]))


@pytest.mark.parametrize(
    ("said", "offload"),
    [
        ("none", Offload("device")),
        ("text", Offload("free")),
        (["codec"], Offload("device", True)),
        ("codec,text", Offload("free", True)),
        (("text", "codec"), Offload("free", True)),
    ],
)
def test_offload_by_words(said: Any, offload: Offload) -> None:
    assert Offload.of(said) == offload
    assert Offload.of(str(offload)) == offload


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("disk", "text, codec, none, not 'disk'"),
        ([], "not nothing"),
        ("none,text", "none goes with no other"),
    ],
)
def test_offload_that_is_nothing_is_one_line(said: Any, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        Offload.of(said)
    words = [word for part in said for word in ("--offload", part)] if isinstance(said, list) else ["--offload", said]
    if words:
        result = CliRunner().invoke(cli, ["generate", PROMPT, *words])
        assert (result.exit_code, result.output.count("\n")) == (2, 1)


def test_the_frames_are_the_same_wherever_things_wait() -> None:
    """A picture in, so that the codec encodes as well as decodes."""
    plain = CausalVideoPipeline.from_pretrained("toybox", device="cpu", offload="none")
    expected = video_of(plain, PROMPT, num_frames=21)
    offloaded = CausalVideoPipeline.from_pretrained("toybox", device="cpu", offload=["text", "codec"])
    assert isinstance(offloaded.codec, OffloadedCodec)
    for given in ({}, {"image": expected[0]}):
        assert np.array_equal(*(video_of(pipe, PROMPT, num_frames=21, **given) for pipe in (offloaded, plain)))


def test_a_codec_is_on_the_device_only_while_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    codec = load_codec(WEIGHTS / "codec", offload=True)
    assert isinstance(codec, OffloadedCodec)
    vae = codec.codec.vae  # type: ignore[attr-defined]
    waiting = {name: weight.data_ptr() for name, weight in vae.state_dict().items()}
    seen: list[set[int]] = []
    forward = type(vae.decoder).forward

    def look(self: Any, *args: Any, **options: Any) -> Tensor:
        seen.append({weight.data_ptr() for weight in vae.state_dict().values()})
        return forward(self, *args, **options)

    monkeypatch.setattr(type(vae.decoder), "forward", look)
    stream = codec.decoder()
    with torch.inference_mode():
        stream.decode(torch.randn(1, 1, 16, 2, 2))
    assert len(seen) == 1
    assert not seen[0] & set(waiting.values())
    assert {name: weight.data_ptr() for name, weight in vae.state_dict().items()} == waiting
    with pytest.raises(RuntimeError):
        stream.decode(torch.randn(1, 1, 15, 2, 2))
    assert {name: weight.data_ptr() for name, weight in vae.state_dict().items()} == waiting
    assert (codec.name, codec.channels, codec.temporal_stride, codec.spatial_stride) == ("wan", 16, 4, 8)


def test_umt5_is_counted() -> None:
    encoder = files.make_encoder()
    sizes = encoder.config
    numbers = umt5_parameters(
        sizes.vocab_size, files.WIDTH, files.HEADS * files.HEAD, files.GATED, files.HEADS, files.LAYERS, files.BUCKETS
    )
    assert numbers == sum(parameter.numel() for parameter in encoder.parameters())
    assert umt5_xxl_bytes() == pytest.approx(11.36e9, rel=1e-3)


def test_umt5_is_counted_from_its_headers(tmp_path: Path) -> None:
    encoder = files.make_encoder(torch.bfloat16)
    files.save_diffusers(tmp_path / "there", encoder)
    assert text_bytes(TextSource(tmp_path / "there")) == 2 * sum(p.numel() for p in encoder.parameters())
    assert text_bytes(TextSource(tmp_path / "nowhere")) == 0


@pytest.mark.parametrize("run", [ALONE, PRESET, LARGE, replace(ALONE, on_cpu=True), replace(PRESET, ranks=4)])
def test_what_just_fits_is_not_refused_and_a_byte_less_is(run: Run) -> None:
    needs = run.plan().memory_bytes
    check_fits(run, needs, "cuda:0")
    check_fits(run, None, "cpu")
    with pytest.raises(ConfigError, match=f"needs {needs / 1e9:.3g} GB on cuda:0 while .*; predicted") as caught:
        check_fits(run, needs - 1, "cuda:0")
    assert "\n" not in str(caught.value)


def test_the_message_says_by_how_much_and_what_helps() -> None:
    with pytest.raises(ConfigError) as caught:
        check_fits(ALONE, 24 * GB, "cuda:0")
    short = ALONE.plan().memory_bytes / 1e9 - 24
    assert f"24 GB are free: short by {short:.3g} GB (weights 2.84, cache 6.9, " in str(caught.value)
    assert "UMT5" not in str(caught.value)
    assert "text encoder 11.4, codec 0.508, its state 3.78" in str(caught.value)
    assert "what would make it fit: --offload text; " in str(caught.value)
    with pytest.raises(ConfigError, match="no option would make it fit"):
        check_fits(ALONE, GB, "cuda:0")


def test_graphs_keep_the_activations_of_a_pass() -> None:
    by_graphs, eager = PRESET.plan(), replace(PRESET, graphs=False).plan()
    for time, size in by_graphs.bytes_by_time.items():
        expected = 0 if time == "text" else by_graphs.activation_bytes
        assert size - eager.bytes_by_time[time] == expected
    assert replace(PRESET, on_cpu=True).plan() == replace(PRESET, on_cpu=True, graphs=False).plan()
    assert "--no-graphs" in remedies(PRESET, PRESET.plan().memory_bytes - 1)
    with pytest.raises(ConfigError, match=f"graphs {by_graphs.activation_bytes / 1e9:.3g}, "):
        check_fits(ALONE, 24 * GB, "cuda:0")
    reuse = ReusePlan.of_causal(MIXED, tuple(1000 - 125.0 * n for n in range(8)), WORK.config.num_layers)
    assert reuse.kept > reuse.stored
    reusing = replace(PRESET, work=replace(WORK, reuse=(reuse,), steps=8))
    stored = reusing.plan().stored_bytes, replace(reusing, graphs=False).plan().stored_bytes
    assert stored[0] * reuse.stored == stored[1] * reuse.kept


def changed(run: Run, words: str) -> Run:
    """The run that a suggestion asks for."""
    for option, value in re.findall(r"--(\w+) (\S+)", words):
        if option == "offload":
            run = replace(run, offload=Offload.of(value))
        if option == "weights":
            run = replace(run, work=replace(run.work, fp8=value == "fp8"))
        if option == "cache":
            run = replace(run, work=replace(run.work, cache=value))
        if option == "window":
            run = replace(run, work=replace(run.work, window=int(value)))
        if option == "strategy":
            run = replace(run, strategy=value)
    run = replace(run, graphs=run.graphs and "--no-graphs" not in words)
    more = re.search(r"(\d+) ranks", words)
    return replace(run, ranks=int(more[1])) if more else run


@pytest.mark.parametrize("on_cpu", [False, True])
@pytest.mark.parametrize("run", [ALONE, PRESET, LARGE, replace(LARGE, ranks=8, strategy="gather-kv")])
def test_every_suggestion_makes_the_run_fit(run: Run, on_cpu: bool) -> None:
    run, told = replace(run, on_cpu=on_cpu), 0
    needs = run.plan().memory_bytes
    for free in range(needs // 4, needs, needs // 7):
        for words in remedies(run, free):
            told += 1
            assert run.plan().memory_bytes > free
            assert changed(run, words).plan().memory_bytes <= free, words
    assert told > 3


def test_options_that_do_not_help_are_not_suggested() -> None:
    """The peak of this run is at decoding, when an offloaded codec is there like any other."""
    free = PRESET.plan().memory_bytes - 1
    said = remedies(PRESET, free)
    assert said[:2] == ["--weights fp8", "--cache int8"]
    assert any(words.startswith("--window 20") for words in said)
    assert not any("codec" in words for words in said)
    little = replace(PRESET, codec=CodecFootprint(GB, 0, 0, 0, 8, 4))  # and here it is at denoising
    assert remedies(little, little.plan().memory_bytes - 1)[0] == "--offload text,codec"


def test_1_3b_runs_in_24_gb() -> None:
    """UMT5-XXL read for the prompt and given up, the Wan VAE in float32, a window of 21: a fifth is left."""
    assert PRESET.plan().bytes_by_time["text"] > umt5_xxl_bytes() + WORK.weights_bytes
    assert PRESET.plan().memory_bytes < 0.8 * 24e9
    model_config = ModelConfig.load(ROOT / "examples" / "wan2.1-1.3b" / "pipeline.json")
    stream, size = model_config.stream, (model_config.height, model_config.width)
    grid = LatentGrid.from_pixels(*size, 8)
    work = Workload.of(PRESETS["wan2.1-1.3b"], grid, stream, model_config.sampler, stream.window or 0)
    assert work == WORK
    (cost,) = plan(work, 1, machine("rtx4090", "pcie"), auxiliary=PRESET.auxiliary)
    assert cost.fits
    result = CliRunner().invoke(cli, ["plan", "--model", "wan2.1-1.3b", "--gpu", "rtx4090", "--ranks", "1", "--json"])
    (found,) = json.loads(result.output)["strategies"]
    assert (found["memory_bytes"], found["fits"]) == (cost.memory_bytes, True)
    assert found["bytes_by_time"] == cost.bytes_by_time
    assert found["auxiliary"]["text"] == umt5_xxl_bytes()


def test_a_run_is_refused_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[Any] = []
    monkeypatch.setattr(loading, "load_model", noted(load_model, lambda *args, **_: loaded.append(args)))
    monkeypatch.setattr(preflight, "free_bytes", lambda device: 25 * 10**6)
    result = CliRunner().invoke(cli, ["generate", PROMPT, "--frames", "1"])
    assert result.exit_code == 2, result.output
    assert re.fullmatch(r"error: this run needs 0\.0325 GB on cpu .* fit: .*--weights fp8.*\n", result.output)
    with pytest.raises(ConfigError, match=r"this run needs 0\.0325 GB"):
        CausalVideoPipeline.from_pretrained("toybox", device="cpu")
    assert not loaded
    CausalVideoPipeline.from_pretrained("toybox", device="cpu", weights="fp8")
    CausalVideoPipeline.from_pretrained("toybox", device="cpu", preflight=False)
    assert len(loaded) == 2


def test_a_recipe_may_say_its_weights(tmp_path: Path) -> None:
    model_config = json.loads((WEIGHTS / "toybox.json").read_text())
    model_config |= {
        "transformer": str(WEIGHTS / model_config["transformer"]),
        "codec": str(WEIGHTS / model_config["codec"]),
    }
    (tmp_path / "pipeline.json").write_text(json.dumps(model_config | {"weights": "fp8"}))
    pipe = CausalVideoPipeline.from_pretrained(tmp_path, device="cpu")
    assert torch.float8_e4m3fn in {parameter.dtype for parameter in pipe.model.parameters()}
    (tmp_path / "pipeline.json").write_text(json.dumps(model_config | {"weights": "int4"}))
    with pytest.raises(ConfigError, match="weights must be full or fp8 or fp8-dynamic, not 'int4'"):
        CausalVideoPipeline.from_pretrained(tmp_path, device="cpu")


def test_what_is_free_is_shared_by_the_ranks_of_a_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:   4096 kB\n")
    assert available_memory(tmp_path / "meminfo") == 4096 * 1024
    assert available_memory(tmp_path / "nothing") is None
    assert left_in_cgroup(tmp_path) is None
    for name, text in (("max", "max"), ("current", "3000"), ("stat", "anon 5\ninactive_file 200\n")):
        (tmp_path / f"memory.{name}").write_text(text)
    assert left_in_cgroup(tmp_path) is None  # no limit
    (tmp_path / "memory.max").write_text("4000\n")
    assert left_in_cgroup(tmp_path) == 1200
    monkeypatch.setattr(free_memory, "available_memory", lambda _: 4001)
    monkeypatch.setattr(free_memory, "left_in_cgroup", lambda _: 4002)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert free_memory.free_bytes(torch.device("cpu")) == 4001
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert free_memory.free_bytes(torch.device("cpu")) == 2000


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize(("model", "ranks"), [("wan2.1-14b", 4), ("wan2.1-14b", 8), ("wan2.1-1.3b", 4)])
def test_a_run_takes_the_strategy_that_it_was_planned_with(model: str, ranks: int, guided: bool) -> None:
    """At 720p what stands beside the model decides which strategy fits."""
    work = replace(WORK, config=PRESETS[model], grid=LatentGrid.from_pixels(720, 1280, 8), guided=WORK.steps * guided)
    run = replace(PRESET, work=work, ranks=ranks // 2 if guided else ranks, cfg=2 if guided else 1, strategy="auto")
    named = [replace(run, strategy=cost.strategy).plan() for cost in run.plans(run.ranks)]
    assert [cost.strategy for cost in named] == [cost.strategy for cost in run.plans(run.ranks)]
    assert run.plan() == next(cost for cost in run.plans(run.ranks) if cost.chosen)


def test_a_recipe_whose_parts_are_missing_is_said_first() -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        CausalVideoPipeline.from_pretrained(ROOT / "examples" / "wan2.1-1.3b", device="cpu")
