"""A model that is one of two is named: Wan 2.2's experts in diffusers' folder, in Wan's own, and as files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from causalrope_sp import CheckpointError
from causalrope_sp.pipeline.load_options import LoadOptions
from causalrope_sp.pipeline.model_source import find_model
from causalrope_sp.weights import inspect_checkpoint, load_model
from tests.support.checkpoints import diffusers_model, save_wan, wan_state
from tests.support.published_folders import wan_pipeline
from tests.support.shell import shell


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("beside")
    wan_pipeline(home).save_pretrained(home / "folder")
    return home / "folder"


@pytest.fixture
def folder(plain: Path, tmp_path: Path) -> Path:
    """With a second transformer, as diffusers saves Wan 2.2's A14B."""
    shutil.copytree(plain, tmp_path / "folder")
    shutil.copytree(plain / "transformer", tmp_path / "folder" / "transformer_2")
    index = tmp_path / "folder" / "model_index.json"
    content = json.loads(index.read_text()) | {
        "transformer_2": ["diffusers", "WanTransformer3DModel"],
        "boundary_ratio": 0.875,
    }
    index.write_text(json.dumps(content))
    return tmp_path / "folder"


def test_two_transformers_are_a_pipeline_and_no_lone_model(folder: Path) -> None:
    told = r"holds two models, transformer/ and transformer_2/ \(two experts by .* which a pipeline runs together"
    config = find_model(folder, LoadOptions())
    assert (config.transformer_2, config.boundary_ratio) == (folder / "transformer_2", 0.875)
    assert "model_index.json says boundary_ratio 0.875" in "; ".join(config.inferred)
    with pytest.raises(CheckpointError, match=told):
        load_model(folder)
    shown = shell("inspect", folder)
    assert shown.exit_code == 2
    assert "transformer/ and transformer_2/ (two experts by noise level" in shown.stderr


@pytest.mark.parametrize("ratio", [None, 0, 1.5, True, "high"])
def test_a_boundary_that_is_none_is_one_sentence(folder: Path, ratio: object) -> None:
    index = folder / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"boundary_ratio": ratio}))
    with pytest.raises(CheckpointError, match=r"whose boundary_ratio must be a number in \(0, 1\)") as caught:
        find_model(folder, LoadOptions())
    assert "\n" not in str(caught.value)


def test_a_second_transformer_that_is_not_there_is_an_error(folder: Path) -> None:
    shutil.rmtree(folder / "transformer_2")
    with pytest.raises(CheckpointError, match="has transformer_2, which this version does not run"):
        find_model(folder, LoadOptions())


def test_an_expert_that_is_named_itself_loads_and_is_named(folder: Path) -> None:
    told = "transformer_2/ beside it: the other expert by noise level, not used"
    load_model(folder / "transformer")
    assert inspect_checkpoint(folder / "transformer").beside == (told,)
    assert told in shell("inspect", folder / "transformer").output
    assert told in find_model(folder / "transformer", LoadOptions(base=folder)).inferred


def test_wans_own_folder_of_two_experts_is_named(plain: Path, tmp_path: Path) -> None:
    for name in ("high_noise_model", "low_noise_model"):
        diffusers_model().save_pretrained(tmp_path / name)
    for open_it in (load_model, inspect_checkpoint):
        with pytest.raises(CheckpointError, match=r"holds two models, high_noise_model/ and low_noise_model/"):
            open_it(tmp_path)
    (beside,) = inspect_checkpoint(tmp_path / "low_noise_model").beside
    assert beside == "high_noise_model/ beside it: the other expert by noise level, not used"


@pytest.mark.parametrize(
    ("name", "partner"),
    [
        ("wan2.2_t2v_high_noise_14B.safetensors", "wan2.2_t2v_low_noise_14B.safetensors"),
        ("Wan2.2-T2V-A14B-LowNoise.safetensors", "Wan2.2-T2V-A14B-HighNoise.safetensors"),
        ("a-HIGH-noise.safetensors", "a-LOW-noise.safetensors"),
    ],
)
def test_files_of_experts_are_named(tmp_path: Path, name: str, partner: str) -> None:
    save_wan(tmp_path / name, wan_state())
    (told,) = inspect_checkpoint(tmp_path / name).beside
    assert told.startswith(f"{partner}, not beside it: its name says that it is one of two experts")
    save_wan(tmp_path / partner, wan_state())
    (told,) = inspect_checkpoint(tmp_path / name).beside
    assert told.startswith(f"{partner}, beside it")


def test_a_lone_model_has_none_beside(plain: Path, tmp_path: Path) -> None:
    assert inspect_checkpoint(plain / "transformer").beside == ()
    assert inspect_checkpoint(save_wan(tmp_path / "high_tide.safetensors", wan_state())).beside == ()
