"""What a model's name opens, and which settings come from where, on small folders in diffusers' layout."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from causalrope_sp import CausalDiT, CausalRopeError, CausalVideoPipeline, CheckpointError, ConfigError, DiTConfig
from causalrope_sp.codec.codec_footprint import codec_footprint
from causalrope_sp.diffusion.schedule import model_timesteps
from causalrope_sp.pipeline import loading
from causalrope_sp.pipeline.load_options import LoadOptions
from causalrope_sp.pipeline.model_config import ModelConfig
from causalrope_sp.pipeline.model_source import find_model, is_hub_name
from causalrope_sp.pipeline.offload import Offload
from causalrope_sp.pipeline.planned_model import PlannedModel
from causalrope_sp.toybox import WEIGHTS
from causalrope_sp.weights import inspect_checkpoint
from causalrope_sp.weights.key_layout import stored_tensors
from causalrope_sp.weights.wan_keys import WAN
from tests.support.published_folders import wan_pipeline
from tests.support.shell import shell


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("sources") / "plain"
    wan_pipeline(home.parent, flow_shift=8.0).save_pretrained(home)
    return home


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    """A copy whose files a test may change; its name says no preset."""
    return Path(shutil.copytree(original, tmp_path / "plain"))


def change(file: Path, **fields: Any) -> None:
    file.write_text(json.dumps({**(json.loads(file.read_text()) if file.exists() else {}), **fields}))


def found(model: Path | str, **options: Any) -> ModelConfig:
    return find_model(model, LoadOptions(**options))


@pytest.mark.parametrize("with_pipeline_file", [False, True])
def test_an_explicit_base_comes_before_the_folders_own_files(folder: Path, with_pipeline_file: bool) -> None:
    if with_pipeline_file:
        own = {"transformer": "transformer", "codec": "vae", "text": "./", "height": 96, "width": 64, "fps": 8}
        change(folder / "pipeline.json", **own)
    assert found(folder).codec == folder / "vae"
    toybox = found("toybox-flow")
    config = found(folder, base="toybox-flow")
    assert (config.codec, config.text) == (toybox.codec, toybox.text)
    assert (config.height, config.fps) == ((96, 8) if with_pipeline_file else (toybox.height, toybox.fps))
    assert "text encoder and VAE of toybox-flow" in config.inferred
    config = found(folder, base="toybox-flow", codec_weights=folder / "vae")
    assert config.codec == folder / "vae"
    assert "text encoder of toybox-flow" in config.inferred


def test_a_part_that_is_not_run_is_an_error_or_is_named(folder: Path) -> None:
    index, absent = folder / "model_index.json", [None, None]
    change(index, transformer_2=absent, image_encoder=absent, boundary_ratio=None)
    assert not [text for text in found(folder).inferred if "not used" in text]
    change(index, image_processor=["transformers", "CLIPImageProcessor"])
    assert "image_processor is not used" in found(folder).inferred
    change(index, transformer_2=["diffusers", "WanTransformer3DModel"], boundary_ratio=0.875)
    with pytest.raises(CheckpointError, match="has transformer_2, which this version does not run"):
        found(folder)
    change(index, image_encoder=["transformers", "CLIPVisionModel"])
    with pytest.raises(CheckpointError, match="has transformer_2 and image_encoder, which"):
        found(folder)


def test_settings_that_are_assumed_are_a_warning(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    def warnings(**options: Any) -> list[str]:
        caplog.clear()
        with caplog.at_level("INFO", logger="causalrope_sp"):
            CausalVideoPipeline.from_pretrained(folder, device="cpu", height=64, width=96, **options)
        return [record.message for record in caplog.records if record.levelname == "WARNING"]

    (line,) = warnings()
    assert "window, chunk_frames, num_inference_steps, solver are assumed" in line
    assert "set preset= or each of them" in line
    assert warnings(preset="self-forcing") == []
    change(folder / "transformer" / "config.json", local_attn_size=-1)
    (line,) = warnings()
    assert ": chunk_frames, num_inference_steps, solver are assumed" in line
    assert warnings(window=6, chunk_frames=3, num_inference_steps=(1000, 500), solver="euler") == []


def test_the_scheduler_gives_the_shift_where_no_preset_does(folder: Path) -> None:
    file = folder / "scheduler" / "scheduler_config.json"
    assert found(folder).sampler.shift == 8
    assert "shift 8" in found(folder).inferred[0]
    assert json.loads(shell("inspect", folder, "--json").output)["sampler"]["shift"] == 8
    assert found(folder, shift=2.0).sampler.shift == 2
    assert found(folder, preset="self-forcing").sampler.shift == 5
    change(file, use_flow_sigmas=False)
    assert found(folder).sampler.shift == 5
    assert "shift are assumed" in found(folder).inferred[1]
    file.write_text(json.dumps({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3}))
    assert found(folder).sampler.shift == 3
    for wrong in ("three", True, [3], -(10**400)):
        change(file, shift=wrong)
        with pytest.raises(CheckpointError, match="the shift must be a number"):
            found(folder)
    change(file, shift=-1)
    with pytest.raises(ConfigError, match="shift must be"):
        found(folder)


def test_a_unipc_scheduler_gives_the_timesteps_that_diffusers_makes_of_it(folder: Path) -> None:
    file = folder / "scheduler" / "scheduler_config.json"
    config = found(folder)
    assert "scheduler/scheduler_config.json says shift 8.0, timestep_rule diffusers" in config.inferred[0]
    assert (config.sampler.timestep_rule, config.sampler.solver) == ("diffusers", "renoise")
    one = found(folder, solver="unipc", num_inference_steps=4, shift=5.0).sampler
    assert model_timesteps(one) == [999, 937, 833, 625]  # of the real WanPipeline, see tests/diffusion
    other = found(folder, solver="unipc", timestep_rule="wan", num_inference_steps=4, shift=5.0).sampler
    assert model_timesteps(other) == [999, 937, 833, 624]
    assert found(folder, preset="self-forcing").sampler.timestep_rule == "wan"  # its authors' code is Wan's
    change(file, use_karras_sigmas=True)
    assert found(folder).sampler.timestep_rule == "wan"
    file.write_text(json.dumps({"_class_name": "UniPCMultistepScheduler", "flow_shift": 3}))  # its default: no flow
    assert found(folder).sampler.timestep_rule == "wan"
    change(file, _class_name="FlowMatchEulerDiscreteScheduler", use_flow_sigmas=True)
    assert found(folder).sampler.timestep_rule == "wan"


def test_an_assumed_number_of_heads_is_said(folder: Path) -> None:
    assert not any("num_heads" in text for text in found(folder).inferred)
    size = DiTConfig(dim=256, ffn_dim=32, num_heads=2, num_layers=1)
    save_file(stored_tensors(WAN, size, CausalDiT(size).state_dict()), folder.parent / "lone.safetensors")
    config = found(folder.parent / "lone.safetensors", base=folder)
    assert "num_heads 2 is assumed, by Wan's head width of 128" in config.inferred
    text = shell("inspect", folder.parent / "lone.safetensors").output
    assert "num_heads = 2 (assumed)" in text
    assert "window = None (assumed)" in text
    assert "dim = 256\n" in text
    report = json.loads(shell("inspect", folder.parent / "lone.safetensors", "--json", "--window", "9").output)
    assert "num_heads" in report["assumed"]
    assert "chunk_frames" in report["assumed"]
    assert not {"dim", "window"} & {*report["assumed"]}


def test_size_and_rate_are_those_of_the_vaes_stride(folder: Path) -> None:
    from diffusers import AutoencoderKLWan

    assert (found(folder).height, found(folder).width, found(folder).fps) == (480, 832, 16)
    shutil.rmtree(folder / "vae")
    wan_2_2 = {"z_dim": 48, "in_channels": 12, "out_channels": 12, "patch_size": 2, "scale_factor_spatial": 16}
    means = {"latents_mean": [0.0] * 48, "latents_std": [1.0] * 48}
    AutoencoderKLWan(base_dim=8, num_res_blocks=1, is_residual=True, **wan_2_2, **means).save_pretrained(folder / "vae")
    assert (found(folder).height, found(folder).width, found(folder).fps) == (704, 1280, 24)
    planned = PlannedModel.open(str(folder)).override(window=21)
    work = planned.workload()
    assert (work.grid.latent_height, work.grid.latent_width) == (704 // 16, 1280 // 16)
    footprint = codec_footprint(folder / "vae", None, 704, 1280, work.chunk_frames)
    assert planned.auxiliary(work, Offload(), on_cpu=True).codec_state == footprint.state


def test_a_plan_says_why_a_whole_model_does_not_open(folder: Path) -> None:
    assert PlannedModel.open(str(folder / "transformer")).parts is None
    shutil.rmtree(folder / "vae")
    with pytest.raises(CheckpointError, match="is a transformer alone"):
        PlannedModel.open(str(folder))


@pytest.mark.parametrize("name", ["checkpoints/model.pt", "a/b.safetensors", "a/b.json", "./model.pt", "../x/y", "~/x"])
def test_local_names_are_not_asked_of_the_hub(name: str) -> None:
    assert not is_hub_name(name)
    with pytest.raises(CheckpointError, match="no such file or folder"):
        found(name)


def test_a_pipeline_file_opens_what_its_folder_opens(folder: Path) -> None:
    change(folder / "pipeline.json", height=96, width=64)
    assert found(folder / "pipeline.json") == found(folder)
    assert (found(folder).height, found(folder).transformer) == (96, folder / "transformer")


@pytest.mark.parametrize("here", [False, True])
def test_ranks_search_in_as_many_steps_wherever_a_folder_is(
    here: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if here:
        (tmp_path / "people" / "small").mkdir(parents=True)
    steps, config = [], find_model("toybox", LoadOptions())
    monkeypatch.setattr(loading, "find_model", lambda model, options: config)

    class Parallel:
        class everyone:
            @staticmethod
            def run_collectively(work: Any) -> Any:
                steps.append(work)
                return work()

    parallel: Any = Parallel()
    assert loading._find_on_every_rank("people/small", LoadOptions(), parallel) is config
    assert len(steps) == 2


def test_a_lone_transformer_of_another_vae_has_no_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    file = WEIGHTS / "toybox.safetensors"
    report = inspect_checkpoint(file)
    other = replace(report, config=replace(report.config, in_channels=32))
    monkeypatch.setattr("causalrope_sp.pipeline.planned_model.inspect_checkpoint", lambda path: other)
    with pytest.raises(ConfigError, match=r"has 32 latent channels, .* published for 16 or 48"):
        PlannedModel.open(str(file))


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("", "model must be a path, not ''"),
        (None, "model must be a path, not None"),
        (b"toybox", "model must be a path, not b'toybox'"),
        ("a\0b", "model must be a path"),
        ("x" * 300, "model must be a path, not .*: File name too long"),
        ("~nobody-of-this-name/x", "no such file or folder"),
        ("/dev/null", "holds no weights"),
    ],
)
def test_what_is_no_model_is_one_sentence(model: Any, said: str) -> None:
    with pytest.raises(CausalRopeError, match=said):
        CausalVideoPipeline.from_pretrained(model)


def test_a_repository_that_is_refused_is_not_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its index alone is: the weights of an A14B are 110 GB. One that runs is fetched with both transformers."""
    asked: list[list[str]] = []

    def snapshot_download(name: str, allow_patterns: list[str], **options: Any) -> str:
        asked.append(allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    index = {"transformer": ["diffusers", "WanTransformer3DModel"], "audio_encoder": ["transformers", "Wav2Vec2Model"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(
        CheckpointError, match=r"people/s2v was not downloaded: .* has audio_encoder, which this version"
    ):
        find_model("people/s2v", LoadOptions())
    assert asked == [["model_index.json", "pipeline.json"]]
    (tmp_path / "model_index.json").write_text(json.dumps({"transformer_2": index["transformer"]}))
    with pytest.raises(CheckpointError):
        find_model("people/a14b", LoadOptions())
    assert "transformer_2/*" in asked[-1]
