"""Models with more channels of input than of latents: the same weights and numbers as diffusers'."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

from causalrope_sp.config import DiTConfig
from causalrope_sp.errors import CheckpointError, ConfigError
from causalrope_sp.grid import LatentGrid
from causalrope_sp.models.causal_dit import CausalDiT
from causalrope_sp.planning.workload import Workload
from causalrope_sp.weights import load_model, save_diffusers
from causalrope_sp.weights.save import save_model
from tests.support.checkpoints import CONFIG, Sinusoid64, run, save_wan, wan_name

if TYPE_CHECKING:
    from diffusers import WanTransformer3DModel

LATENTS, CONTROL = CONFIG.in_channels, 7
CONTROLLED = replace(CONFIG, control_channels=CONTROL)


@pytest.fixture(scope="module")
def theirs() -> WanTransformer3DModel:
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    model = WanTransformer3DModel(
        num_attention_heads=CONFIG.num_heads,
        attention_head_dim=CONFIG.head_dim,
        in_channels=LATENTS + CONTROL,
        out_channels=LATENTS,
        text_dim=CONFIG.text_dim,
        freq_dim=CONFIG.freq_dim,
        ffn_dim=CONFIG.ffn_dim,
        num_layers=CONFIG.num_layers,
        rope_max_seq_len=16,
    ).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.eval()


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_a_model_with_a_control_computes_what_diffusers_does(
    theirs: WanTransformer3DModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs.save_pretrained(tmp_path)
    model = load_model(tmp_path)
    assert model.config == replace(CONTROLLED, text_len=model.config.text_len)
    monkeypatch.setattr(theirs.condition_embedder, "timesteps_proj", Sinusoid64())
    both, text = random(1, LATENTS + CONTROL, 3, 4, 6), random(1, 5, CONFIG.text_dim)
    with torch.no_grad():
        expected = theirs(both, torch.tensor([[700.0] * 18]).double(), text, return_dict=False)[0]
        found = run(model, both, torch.tensor([700.0] * 3).double(), text)
    assert found.shape == expected.shape == (1, LATENTS, 3, 4, 6)
    assert (found - expected).abs().max() < 1e-6 * expected.std(), "their norms and gates are in float32"


def test_a_lone_file_shows_its_control(theirs: WanTransformer3DModel, tmp_path: Path) -> None:
    state = {wan_name(name): tensor for name, tensor in theirs.state_dict().items()}
    bare = load_model(save_wan(tmp_path / "bare.safetensors", state))
    assert (bare.config.in_channels, bare.config.control_channels) == (LATENTS, CONTROL)
    save_model(bare, tmp_path / "own.safetensors")
    own = load_model(tmp_path / "own.safetensors")
    save_diffusers(own, tmp_path / "folder")
    again = load_model(tmp_path / "folder")
    assert own.config == bare.config == again.config
    for name, parameter in bare.state_dict().items():
        assert torch.equal(parameter, own.state_dict()[name])
        assert torch.equal(parameter, again.state_dict()[name])


def test_diffusers_reads_a_model_with_a_control(theirs: WanTransformer3DModel, tmp_path: Path) -> None:
    theirs.save_pretrained(tmp_path / "theirs")
    save_diffusers(load_model(tmp_path / "theirs"), tmp_path / "ours")
    again = type(theirs).from_pretrained(tmp_path / "ours", torch_dtype=torch.float64)
    assert (again.config.in_channels, again.config.out_channels) == (LATENTS + CONTROL, LATENTS)
    for name, parameter in theirs.state_dict().items():
        assert torch.equal(parameter.float(), again.state_dict()[name].float()), name


def test_a_model_that_takes_a_control_more_computes_what_it_did() -> None:
    torch.manual_seed(0)
    model = CausalDiT(replace(CONFIG, text_len=4)).double().requires_grad_(False)
    wider = model.with_control(3).with_control(4)
    assert wider.config == replace(model.config, control_channels=7)
    both, text = random(1, LATENTS + 7, 2, 4, 4), random(1, 4, CONFIG.text_dim)
    times = torch.tensor([500.0, 500.0])
    found, expected = run(wider, both, times, text), run(model, both[:, :LATENTS], times, text)
    assert ((found - expected).norm() / expected.norm()).item() < 1e-12
    wider.patch_embedding.weight += 0.1 * random(*wider.patch_embedding.weight.shape)
    assert not torch.allclose(run(wider, both, times, text), expected)
    assert not torch.equal(run(wider, both, times, text), run(wider, both.flip(1), times, text))


def test_the_plan_counts_the_weights_of_the_control() -> None:
    work = Workload(CONTROLLED, LatentGrid(2, 3), window=3, chunk_frames=1, steps=1)
    assert work.parameters == sum(parameter.numel() for parameter in CausalDiT(CONTROLLED).parameters())
    plain = replace(work, config=CONFIG)
    assert work.linear_flops - plain.linear_flops == 2 * CONFIG.dim * 4 * CONTROL


def test_wrong_channels_are_one_sentence(theirs: WanTransformer3DModel, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="control_channels must be a whole number of at least 0"):
        DiTConfig(dim=12, ffn_dim=8, num_heads=2, num_layers=1, control_channels=-1)
    theirs.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "out_channels": 99}))
    with pytest.raises(CheckpointError, match=r"declares a model that cannot be built: .*control_channels must be"):
        load_model(tmp_path)
