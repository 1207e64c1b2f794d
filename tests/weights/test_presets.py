"""Presets hold the published figures, are guessed from what a checkpoint shows, and run from Python."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from causalrope_sp.cli.main import cli
from causalrope_sp.config import PRESETS, SamplerConfig, StreamConfig
from causalrope_sp.diffusion.noise import seeded_noise
from causalrope_sp.diffusion.schedule import sigmas
from causalrope_sp.errors import ConfigError
from causalrope_sp.grid import LatentGrid
from causalrope_sp.sampling.sampler import sample_chunks
from causalrope_sp.weights import FAMILY, find_preset, inspect_checkpoint, load_model
from causalrope_sp.weights.model_presets import guess_preset
from causalrope_sp.weights.wrappings import Wrapping
from tests.support.checkpoints import CONFIG, save_wan, wan_state

# window, sink, chunk, and the timesteps that the model sees: what a preset comes to, whatever its fields are called.
PUBLISHED = {
    "self-forcing": (21, 0, 3, (1000, 937.5, 833.333, 625)),
    "self-forcing-framewise": (21, 0, 1, (1000, 937.5, 833.333, 625)),
    "causvid": (21, 0, 3, (1000, 757, 522)),
    "causvid-4step": (21, 0, 3, (1000, 960, 888.889, 727.273)),
    "causal-forcing": (21, 0, 3, (1000, 937.5, 833.333, 625)),
    "causal-forcing-framewise": (21, 0, 1, (1000, 937.5, 833.333, 625)),
    "causal-forcing-framewise-1step": (21, 0, 1, (1000,)),
    "causal-forcing-framewise-2step": (21, 0, 1, (1000, 833.333)),
    "longlive-1.3b": (12, 3, 3, (1000, 937.5, 833.333, 625)),
    "krea-realtime-14b": (6, 0, 3, (1000, 937.5, 833.333, 625)),
    "sfwan": (21, 0, 3, (1000, 937.5, 833.333, 625)),
    "longlive-2.0-5b": (32, 8, 8, (999.8, 937.265, 833.055, 624.687)),
}


@pytest.mark.parametrize("name", FAMILY)
def test_published_figures(name: str) -> None:
    preset = find_preset(name)
    window, sink, chunk, timesteps = PUBLISHED[name]
    assert (preset.stream.window, preset.stream.sink, preset.stream.chunk_frames) == (window, sink, chunk)
    assert [1000 * sigma for sigma in sigmas(preset.sampler)] == pytest.approx(timesteps, abs=1e-3)
    opening = (1000, 937.5, 833.333, 625) if name.endswith(("1step", "2step")) else timesteps
    assert [1000 * sigma for sigma in sigmas(preset.sampler.first_chunk)] == pytest.approx(opening, abs=1e-3)
    assert preset.source


def checkpoint(folder: Path, name: str) -> Path:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    return save_wan(folder / name, wan_state())


@pytest.mark.parametrize(
    ("file", "preset"),
    [
        ("checkpoints/self_forcing_dmd.pt", "self-forcing"),
        ("Self-Forcing/framewise/model.pt", "self-forcing-framewise"),
        ("CausVid/autoregressive_checkpoint/model.pt", "causvid"),
        ("causvid/autoregressive_checkpoint_warp_4step_cfg2/model.pt", "causvid-4step"),
        ("chunkwise/causal_forcing.pt", "causal-forcing"),
        ("framewise/causal_forcing.pt", "causal-forcing-framewise"),
        ("causal-forcing++/framewise-2step.pt", "causal-forcing-framewise-2step"),
        ("causal-forcing++/framewise-1step.pt", "causal-forcing-framewise-1step"),
        ("LongLive-1.3B/models/longlive_base.pt", "longlive-1.3b"),
        ("LongLive-2.0-5B/model_bf16.pt", "longlive-2.0-5b"),
        ("krea-realtime-video-14b.safetensors", "krea-realtime-14b"),
        ("SFWan2.1-T2V-1.3B-Diffusers/transformer/diffusion_pytorch_model.safetensors", "sfwan"),
        ("something.safetensors", "none"),
    ],
)
def test_a_path_speaks_for_a_preset(tmp_path: Path, file: str, preset: str) -> None:
    report = inspect_checkpoint(checkpoint(tmp_path, file))
    assert report.preset.name == preset
    assert report.preset.evidence[0].startswith("nothing in" if preset == "none" else "its path says")
    wrong_size = [f"its DiT is not a {FAMILY[preset].size}, which the preset is for"] if preset != "none" else []
    assert list(report.preset.evidence[1:]) == wrong_size


@pytest.mark.parametrize(("size", "name"), [("wan2.1-1.3b", "longlive-1.3b"), ("wan2.2-ti2v-5b", "longlive-2.0-5b")])
def test_of_two_presets_that_a_path_speaks_for_the_size_tells(size: str, name: str) -> None:
    file = Path("LongLive/checkpoints/model.pt")
    preset = guess_preset(file, file, Wrapping(), {}, PRESETS[size])
    assert (preset.name, len(preset.evidence)) == (name, 1)


def test_a_ti2v_model_has_an_image_in_its_first_chunk(tmp_path: Path) -> None:
    file = checkpoint(tmp_path, "self_forcing.safetensors")
    assert not inspect_checkpoint(file).preset.stream.image_in_chunk
    (tmp_path / "config.json").write_text(json.dumps({"num_heads": 3, "model_type": "ti2v"}))
    preset = inspect_checkpoint(file).preset
    assert preset.stream == replace(FAMILY["self-forcing"].stream, image_in_chunk=True)
    assert "config.json says ti2v" in preset.evidence[1]


@pytest.mark.parametrize(
    ("auxiliary", "content", "said"),
    [
        ("transformer/config.json", "CausalWanTransformer3DModel", "config.json names the class"),
        ("model_index.json", "WanCausalDMDPipeline", "model_index.json names the class"),
        ("scheduler/scheduler_config.json", "SelfForcingFlowMatchScheduler", "scheduler_config.json names the class"),
    ],
)
def test_a_folder_of_fastvideo_is_told_by_its_classes(tmp_path: Path, auxiliary: str, content: str, said: str) -> None:
    checkpoint(tmp_path, "transformer/w.safetensors")
    (tmp_path / auxiliary).parent.mkdir(exist_ok=True)
    (tmp_path / auxiliary).write_text(json.dumps({"_class_name": content}))
    preset = inspect_checkpoint(tmp_path).preset
    assert preset.name == "sfwan"
    assert said in preset.evidence[0]


def test_the_parts_that_training_leaves_speak_last(tmp_path: Path) -> None:
    torch.save({"generator": wan_state()}, tmp_path / "model.pt")
    preset = inspect_checkpoint(tmp_path, config=CONFIG).preset
    assert preset.name == "self-forcing"
    assert preset.evidence[0].startswith("it has generator, as Self-Forcing's training leaves it")


def test_a_config_that_says_how_it_runs_is_heard(tmp_path: Path) -> None:
    checkpoint(tmp_path, "longlive.safetensors")
    said = {"num_heads": 3, "local_attn_size": 9, "sink_size": 1, "num_frames_per_block": 2}
    (tmp_path / "config.json").write_text(json.dumps(said))
    preset = inspect_checkpoint(tmp_path).preset
    assert (preset.stream.window, preset.stream.sink, preset.stream.chunk_frames) == (9, 1, 2)
    assert "config.json says window 9, sink 1, chunk_frames 2" in preset.evidence
    (tmp_path / "config.json").write_text(json.dumps(said | {"local_attn_size": 1}))
    preset = inspect_checkpoint(tmp_path).preset
    assert preset.stream == FAMILY["longlive-1.3b"].stream
    assert preset.evidence[-1].startswith("not taken over: window 1 is smaller than chunk + sink")
    (tmp_path / "config.json").write_text(json.dumps(said | {"local_attn_size": -1, "sink_size": "many"}))
    assert inspect_checkpoint(tmp_path).preset.stream.window == 12


def test_every_field_can_be_overridden() -> None:
    preset = find_preset("longlive-1.3b").override(window=None, sink=0, chunk_frames=1, rope="relative", steps=(500,))
    assert preset.stream == StreamConfig(None, 0, 1, rope="relative")
    assert preset.sampler == SamplerConfig((500,), 5.0)
    assert find_preset("causvid").override(shift=2.0, solver="euler").sampler.shift == 2.0
    with pytest.raises(ConfigError, match="a preset has no colour"):
        preset.override(colour="red")
    with pytest.raises(ConfigError, match="window 2 is smaller than chunk"):
        find_preset("causvid").override(window=2)
    with pytest.raises(ConfigError, match="unknown preset 'best'; this version has: self-forcing, "):
        find_preset("best")


def test_a_preset_runs_from_python(tmp_path: Path) -> None:
    file = checkpoint(tmp_path, "longlive.safetensors")
    preset, model = inspect_checkpoint(file).preset, load_model(file)
    text = torch.zeros(1, model.config.text_len, model.config.text_dim)
    noise = seeded_noise(0, (1, CONFIG.in_channels, 4, 4))
    chunks = sample_chunks(model, text, noise, LatentGrid(2, 2), 15, stream=preset.stream, sampler=preset.sampler)
    assert [part.chunk.frames for part in chunks] == [3] * 5


def test_inspect_says_what_why_and_how(tmp_path: Path) -> None:
    content = {
        "generator_ema": {f"model._fsdp_wrapped_module.{name}": t for name, t in wan_state().items()},
        "critic": {"x": 1},
    }
    torch.save(content, tmp_path / "causvid.pt")
    (tmp_path / "config.json").write_text('{"num_heads": 3}')

    def inspect(*words: str) -> str:
        result = CliRunner().invoke(cli, ["inspect", str(tmp_path / "causvid.pt"), *words])
        assert result.exit_code == 0, result.output
        return result.output

    text = inspect()
    assert (
        "wrapping  under generator_ema; prefix model.; within names _fsdp_wrapped_module; unused parts critic" in text
    )
    assert "its blocks have self_attn: model._fsdp_wrapped_module.blocks.0." in text
    assert "its path says causvid.pt" in text
    assert "steps = (1000, 757, 522)" in text
    report = json.loads(inspect("--json", "--preset", "longlive-1.3b", "--window", "9", "--steps", "2", "--shift", "3"))
    assert (report["preset"], report["evidence"][0]) == ("longlive-1.3b", "named by --preset")
    assert (report["stream"]["window"], report["stream"]["sink"]) == (9, 3)
    guidance = {"guidance_scale": 1.0, "guidance_interval": [0, 1000]}
    expected = {
        "steps": [1000, 500],
        "shift": 3,
        "solver": "renoise",
        "timestep_rule": "wan",
        "first_steps": [],
        **guidance,
    }
    assert report["sampler"] == expected
    assert report["wrapping"]["parts"] == ["generator_ema"]
    assert report["wrapping"]["auxiliary"] == ["critic"]


@pytest.mark.parametrize("words", [["--preset", "best"], ["--window", "1"], ["--part", "teacher"], ["--steps", "x"]])
def test_inspect_refuses_in_one_line(tmp_path: Path, words: list[str]) -> None:
    result = CliRunner().invoke(cli, ["inspect", str(checkpoint(tmp_path, "causvid.safetensors")), *words])
    assert (result.exit_code, result.output.count("\n")) == (2, 1), result.output
    assert result.output.startswith("error: ")


def test_inspect_reads_a_models_recipe() -> None:
    report = json.loads(CliRunner().invoke(cli, ["inspect", "toybox-flow", "--json"]).output)
    assert (report["preset"], report["sampler"]["solver"], report["assumed"]) == ("own", "euler", [])
