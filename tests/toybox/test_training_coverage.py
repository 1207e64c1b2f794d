"""How much of each latent pixel each object covers, which a probe of toybox-vin's recipe learns."""

from __future__ import annotations

import pytest
import torch

from causalrope_sp.toybox.prompts import BACKGROUNDS, COLORS, parse_prompt
from causalrope_sp.toybox.scenes import render
from tests.support.paths import ROOT


def test_coverage_is_where_the_objects_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean colour of each latent pixel is that of what covers it; a square of toybox's size covers its area."""
    monkeypatch.syspath_prepend(ROOT / "examples")
    from toybox_training.coverage import coverage_of
    from toybox_training.latents import draw_scenes

    specs, starts = draw_scenes(0)
    pictures = render(specs, starts, torch.arange(81), 32).transpose(1, 2).flatten(0, 1)
    shown = torch.nn.functional.avg_pool2d(pictures, 4).unflatten(0, (len(specs), 81))
    for spec, start, pixels in zip(specs, starts.tolist(), shown, strict=True):
        shares = coverage_of(spec, start, 81, 8).float()
        assert shares.shape == (21, 2, 8, 8)
        assert not shares[:, len(spec.objects) :].any()
        behind = torch.tensor(BACKGROUNDS[spec.background]) / 255
        colors = torch.stack([torch.tensor(COLORS[o.color]) / 255 for o in spec.objects])
        of_objects = torch.einsum("foyx,oc->fcyx", shares[:, : len(spec.objects)], colors - behind)
        for frame in (0, 7, 20):
            pixel_frames = slice(0, 1) if frame == 0 else slice(4 * frame - 3, 4 * frame + 1)
            expected = behind.view(3, 1, 1) + of_objects[frame]
            assert (expected - pixels[pixel_frames].mean(0)).abs().max() < 2e-3, "half precision"
    square = coverage_of(parse_prompt("a red square stays still"), [0.5] * 6, 81, 8)
    assert square[9, 0].float().mean().item() == pytest.approx((2 * 0.92 * 17 / 128) ** 2, rel=0.03)
