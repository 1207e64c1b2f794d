"""The training set that both recipes share, and steps of toybox's DiT on it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from causalrope_sp.codec import load_codec
from causalrope_sp.codec.wan_vae import WanCodec, WanEncoderStream
from causalrope_sp.grid import LatentGrid
from causalrope_sp.toybox import WEIGHTS
from causalrope_sp.toybox.scenes import render
from causalrope_sp.weights import load_model
from tests.support.paths import ROOT

CPU = torch.device("cpu")


def test_dit_learns_from_encoded_scenes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Scenes go on after the encoded frames as if more had been encoded, and some steps log the held-out errors."""
    monkeypatch.syspath_prepend(ROOT / "examples")
    from toybox_training import stages
    from toybox_training.dit import TeacherForcing
    from toybox_training.latents import draw_scenes, encode_changes, encode_scenes

    wan = load_codec(WEIGHTS / "codec", "wan", CPU)
    assert isinstance(wan, WanCodec)
    scenes = encode_scenes(wan.vae, tmp_path / "scenes", 16, 64, 5)
    specs, places = draw_scenes(5)
    longer = render(specs[:2], places[:2], torch.arange(129), 64).transpose(1, 2) * 2 - 1
    with torch.inference_mode():
        encoded = WanEncoderStream(wan.vae).encode(longer)
    made_longer, objects = scenes.frames(torch.tensor([0, 1]), 3, 33)
    assert (made_longer - encoded[:, 3:]).square().mean() < 1e-3 * encoded.square().mean()
    assert objects.shape == (2, 30, 8, 8)

    monkeypatch.setattr(stages, "MEASURED_EVERY", 1)
    monkeypatch.setattr(stages, "NEW", 2)
    model = load_model(WEIGHTS / "toybox.safetensors", dtype=torch.float32)
    before = [x.clone() for x in model.parameters()]
    changes = encode_changes(wan.vae, tmp_path / "changes", 16, 64, 6)
    forcing = TeacherForcing(LatentGrid.from_pixels(64, 64, 8), CPU)
    with torch.compiler.set_stance("force_eager"):
        training = stages.DiTTraining(forcing, scenes, scenes, changes, torch.ones(16))
        trained = training.train(tmp_path / "dit.pt", model, 2, 1e-3)
    assert any(not torch.equal(x, y) for x, y in zip(before, trained.parameters(), strict=True))
    assert all(x.isfinite().all() for x in trained.parameters())
    logged = json.loads((tmp_path / "dit.jsonl").read_text())
    assert 0 < logged["held_out_first"] < logged["held_out_later"] < 1
