"""The training set that both recipes share, and steps of toybox's DiT on it."""

from __future__ import annotations

import importlib
import json
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import click
import pytest
import torch
from click.testing import CliRunner

from causalrope_sp.codec import load_codec
from causalrope_sp.codec.wan_vae import WanCodec, WanEncoderStream
from causalrope_sp.grid import LatentGrid
from causalrope_sp.toybox import WEIGHTS
from causalrope_sp.toybox.prompts import SceneSpec
from causalrope_sp.toybox.scenes import render
from causalrope_sp.weights import load_model
from tests.support.paths import ROOT

CPU = torch.device("cpu")


def test_dit_learns_from_encoded_scenes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Scenes go on after the encoded frames as if more had been encoded, and steps log what they and others err."""
    monkeypatch.syspath_prepend(ROOT / "examples")
    from toybox_training import stages
    from toybox_training.dit import TeacherForcing
    from toybox_training.latents import VISIBLE, Changes, draw_scenes, encode_scenes

    wan = load_codec(WEIGHTS / "codec", "wan", CPU)
    assert isinstance(wan, WanCodec)
    scenes = encode_scenes(wan.vae, tmp_path / "scenes", 16, 64, 5)
    specs, starts = draw_scenes(5)

    def encoded(scenes: list[SceneSpec]) -> torch.Tensor:
        pixels = render(scenes, starts[:2], torch.arange(129), 64).transpose(1, 2) * 2 - 1
        with torch.inference_mode():
            return WanEncoderStream(wan.vae).encode(pixels)[:, 3:]

    longer, behind = encoded(specs[:2]), encoded([SceneSpec((), scene.background) for scene in specs[:2]])
    latents, objects = scenes.frames(torch.tensor([0, 1]), 3, 33)
    assert (latents - longer).square().mean() < 1e-4 * longer.square().mean()
    assert (objects != ((longer - behind).abs().mean(2) > VISIBLE)).float().mean() < 1e-3

    monkeypatch.setattr(stages, "MEASURED_EVERY", 2)
    monkeypatch.setattr(stages, "NEW", 2)
    monkeypatch.setattr(stages, "time", SimpleNamespace(monotonic=count().__next__))  # a second a step
    model = load_model(WEIGHTS / "toybox.safetensors", dtype=torch.float32)
    before = [x.clone() for x in model.parameters()]
    changes = Changes(scenes.latents[:, :13], scenes.latents[:, :16], scenes.embeds, scenes.objects[:, :16])
    forcing = TeacherForcing(LatentGrid.from_pixels(64, 64, 8), CPU)
    with torch.compiler.set_stance("force_eager"):
        training = stages.DiTTraining(forcing, scenes, scenes, changes, torch.ones(16), batch=2)
        trained = training.train(tmp_path / "dit.pt", model, 3 / 60, 1e-3)
    assert any(not torch.equal(x, y) for x, y in zip(before, trained.parameters(), strict=True))
    assert all(x.isfinite().all() for x in trained.parameters())
    assert (tmp_path / "dit-plateau.pt").is_file(), "also where one step takes all of the time"
    logged = json.loads((tmp_path / "dit.jsonl").read_text())
    assert 0 < logged["held_out_first"] < logged["held_out_later"] < 1
    assert logged["held_out_later"] == logged["learned_later"], "the same scenes"


@pytest.mark.parametrize(
    ("recipe", "option"), [("train_toybox", "--made-minutes"), ("train_vin", "--minutes"), ("train_vin", "--rate")]
)
def test_a_number_that_is_none_is_refused_before_anything_is_made(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, recipe: str, option: str
) -> None:
    monkeypatch.syspath_prepend(ROOT / "examples")
    found = CliRunner().invoke(importlib.import_module(recipe).main, ["--out", str(tmp_path / "runs"), option, "nan"])
    assert found.exit_code == 2
    assert f"Invalid value for '{option}': expected a finite number, not nan" in found.output
    assert not (tmp_path / "runs").exists()


def test_a_checkpoint_of_another_model_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(ROOT / "examples")
    from toybox_training.training import Training

    Training(torch.nn.Linear(2, 3), tmp_path / "a.pt", 1e-3, lambda _, p: p.ndim == 2, 0.9).save()
    Training(torch.nn.Linear(2, 3), tmp_path / "a.pt", 1e-3, lambda _, p: p.ndim == 2, 0.9)
    with pytest.raises(click.UsageError, match=r"a.pt is the checkpoint of another model: give another --out"):
        Training(torch.nn.Linear(2, 4), tmp_path / "a.pt", 1e-3, lambda _, p: p.ndim == 2, 0.9)


def test_a_training_set_is_made_again_where_its_settings_differ(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(ROOT / "examples")
    from toybox_training.kept import kept

    made: list[int] = []

    def make() -> dict[str, torch.Tensor]:
        made.append(1)
        return {"x": torch.ones(1)}

    for settings, times, said in (([1, 2.5], 1, ""), ([1, 2.5], 1, ""), ([1, 3], 2, "other settings"), ([1, 3], 2, "")):
        assert kept(tmp_path / "set", settings, make)["x"] == 1
        assert len(made) == times
        assert said in capsys.readouterr().out
    assert [file.name for file in tmp_path.iterdir()] == ["set.0.pt"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--device", "abacus"], "--device: expected a device of this machine, such as cpu or cuda, not 'abacus'"),
        (["--device", "cuda:77"], "not 'cuda:77'"),
        (["--device", "meta"], "not 'meta'"),
        (["--size", "65"], "--size: expected a multiple of 16 pixels, not 65"),
        (["--codec-steps", "0"], "0 is not in the range x>=1"),
        (["--batch", "0"], "0 is not in the range x>=1"),
        (["--size", "0"], "0 is not in the range x>=16"),
        ([], "was trained on another codec: expected the folder that it began with"),
    ],
)
def test_what_cannot_be_trained_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, words: list[str], message: str
) -> None:
    """The last: a DiT that learned from a given codec, and a further call that would train another one."""
    monkeypatch.syspath_prepend(ROOT / "examples")
    (tmp_path / "dit.pt").touch()
    found = CliRunner().invoke(importlib.import_module("train_toybox").main, ["--out", str(tmp_path), *words])
    assert found.exit_code == 2
    assert message in " ".join(found.output.replace("│", " ").split())
    assert [file.name for file in tmp_path.iterdir()] == ["dit.pt"]
