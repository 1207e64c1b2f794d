"""The training set that both recipes share, and steps of toybox's DiT on it."""

from __future__ import annotations

import importlib
import json
import shutil
from itertools import count
from pathlib import Path
from types import ModuleType, SimpleNamespace

import click
import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

from causalrope_sp import CausalVideoPipeline
from causalrope_sp.codec import load_codec
from causalrope_sp.codec.wan_vae import WanCodec, WanEncoderStream
from causalrope_sp.grid import LatentGrid
from causalrope_sp.toybox import WEIGHTS
from causalrope_sp.toybox.prompts import SceneSpec
from causalrope_sp.toybox.scenes import render
from causalrope_sp.weights import load_model
from tests.support.paths import ROOT

CPU = torch.device("cpu")
FILE = "diffusion_pytorch_model.safetensors"  # of a codec


def test_dit_learns_from_encoded_scenes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Scenes go on after the encoded frames as if more had been encoded, and steps log what they and others err."""
    monkeypatch.syspath_prepend(ROOT / "examples")
    from toybox_training import stages, training
    from toybox_training.dit import TeacherForcing
    from toybox_training.latents import VISIBLE, Changes, draw_scenes, encode_scenes

    wan = load_codec(WEIGHTS / "codec", "wan", CPU)
    assert isinstance(wan, WanCodec)
    scenes = encode_scenes(wan.vae, tmp_path / "scenes", 16, 5)
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
    monkeypatch.setattr(
        training, "time", SimpleNamespace(monotonic=count().__next__, perf_counter=lambda: 0.0)
    )  # a second a step
    model = load_model(WEIGHTS / "toybox.safetensors", dtype=torch.float32)
    before = [x.clone() for x in model.parameters()]
    changes = Changes(scenes.latents[:, :13], scenes.latents[:, :16], scenes.embeds, scenes.objects[:, :16])
    forcing = TeacherForcing(LatentGrid.from_pixels(64, 64, 8), CPU)
    with torch.compiler.set_stance("force_eager"):
        stage = stages.DiTTraining(forcing, scenes, scenes, changes, torch.ones(16), batch=2)
        trained = stage.train(tmp_path / "dit.pt", model, 3 / 60, 1e-3, codec=5)
    assert any(not torch.equal(x, y) for x, y in zip(before, trained.parameters(), strict=True))
    assert all(x.isfinite().all() for x in trained.parameters())
    assert (tmp_path / "dit-plateau.pt").is_file()
    logged = json.loads((tmp_path / "dit.jsonl").read_text().splitlines()[-1])
    assert logged["step"] == 3
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
        (["--codec-steps", "0"], "0 is not in the range x>=1"),
        (["--batch", "0"], "0 is not in the range x>=1"),
        (["--codec-stop", "3601"], "--codec-stop: expected at most --codec-steps, 3600, not 3601"),
        ([], "was trained on another codec: expected the folder that it began with, or give another --out"),
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


def words_of(found: Result) -> str:
    return " ".join(found.output.replace("│", " ").split())


def another_codec(folder: Path) -> Path:
    shutil.copytree(WEIGHTS, folder)
    state = load_file(folder / "codec" / FILE)
    state["encoder.conv_in.bias"] *= 1.01
    save_file(state, folder / "codec" / FILE)
    return folder


def minutes(dit: float, decoder: float) -> list[str]:
    return ["--dit-minutes", str(dit), "--decoder-minutes", str(decoder), "--made-minutes", str(decoder)]


def frames_of(pipe: CausalVideoPipeline, count: int) -> int:
    chunks = [chunk.frames for chunk in pipe.stream("a red circle bounces", num_frames=count)]
    return sum(len(frames) for frames in chunks if frames is not None)


def test_both_recipes_end_with_a_model_that_generates(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """After one step a stage. A call that trains nothing changes nothing; one that begins elsewhere is refused."""
    monkeypatch.syspath_prepend(ROOT / "examples")
    from toybox_training import latents, made, stages

    toybox, vin = importlib.import_module("train_toybox"), importlib.import_module("train_vin")
    for module, name, value in (
        (latents, "HELD_OUT", 16),
        (stages, "NEW", 2),
        (made, "AT_ONCE", 2),
        (toybox, "MADE", 2),
        (toybox, "MADE_BY_FLOW", 2),
        (vin, "LENGTHS", {17: 1.0}),
    ):
        monkeypatch.setattr(module, name, value)

    def train(recipe: ModuleType, out: str, *options: str) -> Result:
        with torch.compiler.set_stance("force_eager"):
            return CliRunner().invoke(
                recipe.main, ["--device", "cpu", "--out", str(tmp_path / out), "--scenes", "16", *options]
            )

    begun = ["--init", str(WEIGHTS), "--changes", "16"]
    assert train(toybox, "toybox", *begun, *minutes(1e-4, 1e-4)).exception is None
    weights = tmp_path / "toybox" / "weights"
    assert {file.name for file in weights.iterdir()} == {"codec", "toybox.safetensors", "pipeline.json"}
    tuned = (weights / "codec" / FILE).read_bytes()
    trained, shipped = load_file(weights / "toybox.safetensors"), load_file(WEIGHTS / "toybox.safetensors")
    assert any(not torch.equal(trained[name], shipped[name]) for name in shipped)
    assert train(toybox, "toybox", *begun, *minutes(0, 0)).exception is None
    again = load_file(weights / "toybox.safetensors")
    assert all(torch.equal(again[name], trained[name]) for name in trained)
    encoded = (tmp_path / "toybox" / "scenes.0.pt").stat().st_mtime_ns
    elsewhere = train(toybox, "toybox", "--init", str(another_codec(tmp_path / "elsewhere")), "--changes", "16")
    assert elsewhere.exit_code == 2
    assert "was trained on another codec: give another --out" in words_of(elsewhere)
    assert (tmp_path / "toybox" / "scenes.0.pt").stat().st_mtime_ns == encoded, "nothing is lost"
    assert (weights / "codec" / FILE).read_bytes() == tuned
    pipe = CausalVideoPipeline.from_pretrained(str(weights))
    assert frames_of(pipe, 5) == 5

    few = ["--toybox", str(weights), "--videos", "2"]
    assert train(vin, "vin", *few, "--minutes", "1e-4", "--reading-minutes", "1e-4").exception is None
    pipe = CausalVideoPipeline.from_pretrained(str(tmp_path / "vin" / "weights"), parallel_chunks="vin")
    assert frames_of(pipe, 65) == 65
    other = train(vin, "vin", *few, "--dit", str(weights / "toybox.safetensors"))
    assert other.exit_code == 2
    assert "--dit: the DiT of" in other.output
    for out, options, message in (
        ("other", ["--toybox", str(tmp_path)], "no such file or folder"),
        ("toybox", few, "is the folder of toybox's own training: give another one"),
    ):
        refused = train(vin, out, *options)
        assert refused.exit_code == 2
        assert message in words_of(refused)
    (tmp_path / "vin" / "vin.pt").write_bytes(b"")
    assert "vin.pt cannot be read as a checkpoint: delete it or give another --out" in words_of(train(vin, "vin", *few))
